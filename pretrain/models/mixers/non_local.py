"""The non-local block (Wang et al. 2018, equation 6): y = W softmax(theta phi^T) g, the embedded Gaussian.

The residual is the block's own. The factor of the scores is 1 / sqrt(width), as in the authors' code (the paper has
none), unless `model.attention.scale` says another; the norm after W is left out. A class token is a place like the
others: the operation knows no grid.

Shapes: B batch, S places, E hidden size, D half of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Core
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Dropout, Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.places import weight_dropout
from headway.pretrain.models.seat import Seat


class NonLocal(Mixer):
    """One head of half the width."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        half = max(1, model.hidden // 2)
        self.theta = build_linear(model, model.hidden, half)
        self.phi = build_linear(model, model.hidden, half)
        self.g = build_linear(model, model.hidden, half)
        self.o = build_linear(model, half, model.hidden)
        self.dropout = Dropout(model.attention.dropout)
        self.core = Core(model.attention, "nonlocal", seat.layer)

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
        asking, asked = x_BSE[:, :queries], x_BSE
        heads = [f(x).unsqueeze(1) for f, x in ((self.theta, asking), (self.phi, asked), (self.g, asked))]
        dropout = weight_dropout(self.dropout, noise, asking.shape[1])
        y_B1SD = self.core(heads[0], heads[1], heads[2], mask, dropout)
        return self.o(y_B1SD.squeeze(1)), None

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        half, gains = max(1, model.hidden // 2), int(model.spectral)
        into = linear(model.hidden, half, model.bias, seat.tokens, gains)
        out = linear(half, model.hidden, model.bias, seat.tokens, gains)
        return [into, into, into, out, Cost(0, 4 * half * seat.tokens**2)]
