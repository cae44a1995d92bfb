"""Induced set attention (Set Transformer, Lee et al. 2019, equations 9, 10): m learned points stand between tokens.

H = MAB(I, X), and the tokens attend to H: two attentions of n by m. MAB(I, X) is a block of its own, LayerNorm(Z +
rFF(Z)) with Z = LayerNorm(I + Attention(I, X, X)) (equations 6 and 7). The second MAB's residual, norm and row-wise
layer are those of the transformer block that this mixer sits in. Norms are the model's, and none where it has none.

Points see no order and no documents; padding is hidden from them.

Shapes: B batch, S sequence, M points, E hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Attention
from headway.pretrain.models.cost import Cost, linear, norm
from headway.pretrain.models.layers import Noise, build_linear, build_norm, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.inner import INNER, as_dense, attention_parts, noise_of_latents, read_mask
from headway.pretrain.models.seat import Seat


class Induced(Mixer):
    """Points read the tokens, and tokens read the points."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        self.induced = nn.Parameter(torch.empty(settings["latents"], model.hidden))
        self.read = Attention(as_dense(model), INNER)
        self.read_norm = build_norm(model)
        self.rff = build_linear(model, model.hidden, model.hidden)
        self.rff_norm = build_norm(model)
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
        points_BME = self.points(x_BSE, mask, noise)
        y_BSE, _ = self.write(x_BSE[:, :queries], Mask(causal=False), None, noise, memory_BME=points_BME)
        return y_BSE, None

    def points(self, x_BSE: Tensor, mask: Mask, noise: Noise | None = None) -> Tensor:
        """What the points have read, [B, M, E]."""
        count = len(self.induced)
        points_BME = self.induced.repeat(len(x_BSE), 1, 1)
        given = read_mask(mask, count), None, noise_of_latents(noise, count)
        points_BME = self.read_norm(points_BME + self.read(points_BME, *given, memory_BME=x_BSE)[0])
        return self.rff_norm(points_BME + torch.relu(self.rff(narrowed(points_BME))))

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, n, m = model.hidden, seat.tokens, settings["latents"]
        return [
            Cost(m * e),
            *attention_parts(model, m, n),
            *attention_parts(model, n, m),
            linear(e, e, model.bias, m, int(model.spectral)),
            *[norm(model, e)] * 2,
        ]
