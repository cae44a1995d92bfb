"""Gates of channels and places in place of attention, for images: squeeze-and-excitation (Hu et al. 2018) and CBAM
(Woo et al. 2018). What the tokens before the patches mean to them: see `headway.kernels.attention.grid`.

Shapes: B batch, S places, E hidden size, K side of a convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headway.kernels.attention.grids import grid
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Linear, Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.places import first_places, odd
from headway.pretrain.models.seat import Seat


class SqueezeExcite(Mixer):
    """x sigmoid(expand(relu(reduce(mean of x)))).

    The layer adds gated features of its input to the residual stream; the paper gates what a residual branch adds.
    """

    biased = True
    """Whether the two layers have biases where the model's have: timm's do, the paper writes none."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        shape = model if self.biased else model.model_copy(update={"bias": False})
        width = max(1, model.hidden // settings["reduction"])
        self.first = first_places(model)
        self.reduce = build_linear(shape, model.hidden, width)
        self.expand = build_linear(shape, width, model.hidden)

    def excite(self, x_BE: Tensor) -> Tensor:
        """The bottleneck, [B, E]."""
        y: Tensor = self.expand(torch.relu(self.reduce(x_BE)))
        return y

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
        return grid.squeeze_excite(narrowed(x_BSE), self.first, self.excite)[:, :queries], None

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        width, gains = max(1, model.hidden // settings["reduction"]), int(model.spectral)
        return [
            linear(model.hidden, width, model.bias, 1, gains),
            linear(width, model.hidden, model.bias, 1, gains),
        ]


class CBAM(SqueezeExcite):
    """A gate of channels from means and maxima, then one of places from a convolution.

    Its batch norm is left out: statistics of a batch would depend on the layout. A bias takes the norm's place.
    """

    biased = False

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        self.spatial = Linear(2 * odd(settings["kernel_size"]) ** 2, 1)

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
        weight, bias = self.spatial.weight, self.spatial.bias
        return grid.cbam(narrowed(x_BSE), self.first, self.excite, weight, bias)[:, :queries], None

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        width, gains = max(1, model.hidden // settings["reduction"]), int(model.spectral)
        return [
            # Applied twice: to means and to maxima.
            linear(model.hidden, width, False, 2, gains),
            linear(width, model.hidden, False, 2, gains),
            linear(2 * settings["kernel_size"] ** 2, 1, True, seat.tokens - first_places(model)),
        ]
