"""CvT's attention (Wu et al. 2021, section 3.2): depthwise convolutions of the grid before q, k and v.

Their batch norms are left out, and nothing takes their place: statistics of a batch would depend on the layout, and a
layer norm would be another method. Tokens before the patches pass the convolutions by and take part in attention. The
factor of the scores is 1 / sqrt(D) unless `model.attention.scale` says another (the authors' code has 1 / sqrt(E)).

Shapes: B batch, S places, T places that are left as keys, E hidden size, H heads, D head dimension, K side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headway.kernels.attention.grids import grid
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Core
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Dropout, Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.places import first_places, odd, weight_dropout
from headway.pretrain.models.seat import Seat


class CvT(Mixer):
    """Multi-head attention of convolved queries (stride 1) to convolved keys and values (`stride`)."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        taps = odd(settings["kernel_size"]) ** 2
        self.first, self.stride, self.head_dim = first_places(model), settings["stride"], model.head_width
        self.q_conv, self.k_conv, self.v_conv = (
            nn.Parameter(torch.empty(model.hidden, taps)) for _ in range(3)
        )
        self.q = build_linear(model, model.hidden, model.heads * self.head_dim)
        self.k = build_linear(model, model.hidden, model.kv * self.head_dim)
        self.v = build_linear(model, model.hidden, model.kv * self.head_dim)
        self.o = build_linear(model, model.heads * self.head_dim, model.hidden)
        self.dropout = Dropout(model.attention.dropout)
        self.core = Core(model.attention, "cvt", seat.layer)

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
        x_BSE = narrowed(x_BSE)
        q_BHSD = self._heads(self.q(grid.convolved(x_BSE, self.first, self.q_conv)[:, :queries]))
        k_BKTD = self._heads(self.k(grid.convolved(x_BSE, self.first, self.k_conv, self.stride)))
        v_BKTD = self._heads(self.v(grid.convolved(x_BSE, self.first, self.v_conv, self.stride)))
        dropout = weight_dropout(self.dropout, noise, q_BHSD.shape[2])
        y_BHSD = self.core(q_BHSD, k_BKTD, v_BKTD, mask, dropout)
        return self.o(y_BHSD.transpose(1, 2).flatten(2)), None

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, taps, gains = model.hidden, settings["kernel_size"] ** 2, int(model.spectral)
        first, wide, narrow = first_places(model), model.heads * model.head_width, model.kv * model.head_width
        patches = seat.tokens - first
        kept = math.ceil(math.isqrt(patches) / settings["stride"]) ** 2
        keys = first + kept
        return [
            *(Cost(e * taps, 2 * e * taps * places) for places in (patches, kept, kept)),
            linear(e, wide, model.bias, seat.tokens, gains),
            linear(e, narrow, model.bias, keys, gains),
            linear(e, narrow, model.bias, keys, gains),
            linear(wide, e, model.bias, seat.tokens, gains),
            Cost(0, 4 * wide * seat.tokens * keys),
        ]
