"""What every mixer is: a module with the calls of `Attention`, and costs that follow from its config.

Shapes: B batch, S sequence, M encoder's sequence, E hidden size, H query heads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Beside
from headway.pretrain.models.cost import Cost
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.seat import Seat


class Mixer(nn.Module):
    """From a layer's input to what it adds. Subclasses build their parameters in `__init__` and do not fill them."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        """
        Args:
            model: the shape.
            seat: where the layer sits.
            settings: numbers of the mechanism, by name.
        """
        super().__init__()

    @abstractmethod
    def forward(
        self,
        x_BSE: Tensor,
        mask: Mask,
        turn: Rotation | None = None,
        noise: Noise | None = None,
        bias_HSM: Bias | None = None,
        memory_BME: Tensor | None = None,
        queries: int | None = None,
    ) -> tuple[Tensor, Beside | None]:
        """Returns [B, S, E], of the first `queries` places if given, and what is wanted beside. See
        `Attention.forward`."""

    @staticmethod
    @abstractmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        """Parameters and FLOPs of one row's forward, `seat.tokens` long."""
