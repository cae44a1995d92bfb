"""Perceiver IO as a mixer (Jaegle et al. 2021, section 3.1; 2022, section 3): latents read, think, and are read.

m latents attend to the tokens, pass `depth` layers of attention to each other, and the tokens, as output queries,
attend to what they have become: O(n m + m^2). The residual and the feed-forward layer of the last attention are those
of the transformer block that this mixer sits in. The layers of the latents are pre-norm blocks with the model's heads,
whose feed-forward layers are GELU and WIDENING times as wide as the latents.

Latents see no order beyond what the tokens carry, and no documents; padding is hidden from them.

Shapes: B batch, S sequence, M latents, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.attention.words.mixers import WIDENING
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Attention
from headway.pretrain.models.cost import Cost, mlp, norm
from headway.pretrain.models.layers import MLP, Noise, build_norm
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.inner import INNER, as_dense, attention_parts, noise_of_latents, read_mask
from headway.pretrain.models.seat import Seat


def plain(model: config.Model) -> config.Model:
    """The model with feed-forward layers of two matrices."""
    return model.model_copy(update={"activation": "gelu"})


class Perceiver(Mixer):
    """Latents between tokens and tokens."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        self.latents = nn.Parameter(torch.empty(settings["latents"], model.hidden))
        self.layers = nn.ModuleList(LatentLayer(model) for _ in range(1 + settings["depth"]))
        self.norm = build_norm(model)
        self.write = Attention(as_dense(model), INNER)

    def forward(
        self,
        x_BSE: Tensor,
        mask: Mask,
        turn: Rotation | None = None,
        noise: Noise | None = None,
        bias_HSM: Bias | None = None,
        memory_BME: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, None]:
        """Returns [B, S, E], of the first `queries` places if given, and None."""
        z_BME = self.norm(self.encoded(x_BSE, mask, noise))
        y_BSE, _ = self.write(x_BSE[:, :queries], Mask(causal=False), None, noise, memory_BME=z_BME)
        return y_BSE, None

    def encoded(self, x_BSE: Tensor, mask: Mask, noise: Noise | None = None) -> Tensor:
        """The latents after all their layers, [B, M, E]; the first layer reads the tokens."""
        count = len(self.latents)
        z_BME = self.latents.repeat(len(x_BSE), 1, 1)
        noise = noise_of_latents(noise, count)
        first, *others = self.layers
        z_BME = first(z_BME, read_mask(mask, count), noise, x_BSE)
        for layer in others:
            z_BME = layer(z_BME, Mask(causal=False), noise)
        return z_BME

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, n, m, depth = model.hidden, seat.tokens, settings["latents"], settings["depth"]
        layer = [*[norm(model, e)] * 2, *mlp(plain(model), m, WIDENING * e)]
        return [
            Cost(m * e),
            *attention_parts(model, m, n),
            *attention_parts(model, m, m) * depth,
            *layer * (1 + depth),
            norm(model, e),
            *attention_parts(model, n, m),
        ]


class LatentLayer(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)), without a mask of order."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.attention_norm = build_norm(model)
        self.attention = Attention(as_dense(model), INNER)
        self.mlp_norm = build_norm(model)
        self.mlp = MLP(plain(model), WIDENING * model.hidden)

    def forward(
        self, z_BME: Tensor, mask: Mask, noise: Noise | None, source_BSE: Tensor | None = None
    ) -> Tensor:
        """Returns [B, M, E]; reads `source_BSE`, or itself if None."""
        added, _ = self.attention(self.attention_norm(z_BME), mask, None, noise, memory_BME=source_BSE)
        z_BME = z_BME + added
        return z_BME + self.mlp(self.mlp_norm(z_BME))
