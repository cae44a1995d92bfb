"""Multi-scale deformable attention (Zhu et al. 2021) of a grid of patches to itself.

Levels beyond the first are means of the values over 2 x 2, 4 x 4, ... patches, where the paper takes maps of a
backbone. Offsets begin as a ring of directions (`deformable.ring`), a constant that learned offsets are added to.
Tokens before the patches ask from the middle of the image, and move by their own offsets; they have no place on the
grid, so that no patch reads them (the authors' object queries are alike).

Shapes: B batch, S places, N patches, E hidden size, H heads, D head dimension, L levels, P points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from headway.kernels.attention.choose import choose
from headway.kernels.attention.grids import deformable
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.cost import Cost, linear
from headway.pretrain.models.layers import Linear, Noise, build_linear, narrowed
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.places import first_places
from headway.pretrain.models.seat import Seat


class Deformable(Mixer):
    """Where a query looks, and how much it takes, are linear in it."""

    def __init__(self, model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> None:
        super().__init__(model, seat, settings)
        self.first, self.head_dim, self.request = (
            first_places(model),
            model.head_width,
            model.attention.kernel,
        )
        self.depth, self.points = settings["depth"], settings["points"]
        wide, places = model.heads * self.head_dim, model.heads * self.depth * self.points
        self.offsets = Linear(model.hidden, 2 * places)
        self.amounts = Linear(model.hidden, places)
        self.v = build_linear(model, model.hidden, wide)
        self.o = build_linear(model, wide, model.hidden)

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
        v_BHDN = self.v(x_BSE[:, self.first :]).unflatten(-1, (-1, self.head_dim)).permute(0, 2, 3, 1)
        side = math.isqrt(v_BHDN.shape[3])
        levels = deformable.pyramid(v_BHDN.unflatten(3, (side, side)), self.depth)
        sides = [level.shape[-1] for level in levels]
        places_BSHLP2, weights_BSHLP = self.looks(x_BSE[:, :queries], sides)
        compute = choose("deformable", self.request).compute
        y_BHSD = compute(levels, places_BSHLP2, weights_BSHLP)
        return self.o(y_BHSD.transpose(1, 2).flatten(2)), None

    def looks(self, x_BSE: Tensor, sides: list[int]) -> tuple[Tensor, Tensor]:
        """Where the first places of a row look, as fractions [B, S, H, L, P, 2], how much they take [B, S, H, L, P];
        in fp32 or wider.

        Args:
            x_BSE: those that ask.
            sides: of the levels' maps.
        """
        wide, device = torch.promote_types(x_BSE.dtype, torch.float32), x_BSE.device
        shape = (-1, self.depth, self.points)
        offsets = self.offsets(x_BSE).to(wide).unflatten(-1, (*shape, 2))
        offsets = offsets + deformable.ring(offsets.shape[2], self.points, device, wide)[:, None]
        stand_S2 = deformable.centres(sides[0], self.first, device, wide)[: x_BSE.shape[1]]
        steps_L11 = 1 / torch.tensor(sides, device=device, dtype=wide)[:, None, None]
        places = stand_S2[:, None, None, None] + offsets * steps_L11
        scores = self.amounts(x_BSE).to(wide).unflatten(-1, shape)
        return places, scores.flatten(-2).softmax(-1).unflatten(-1, shape[1:])

    @staticmethod
    def parts(model: config.Model, seat: Seat, settings: Mapping[str, Any]) -> list[Cost]:
        e, n, wide, gains = model.hidden, seat.tokens, model.heads * model.head_width, int(model.spectral)
        each = settings["depth"] * settings["points"]
        return [
            linear(e, 2 * model.heads * each, True, n),
            linear(e, model.heads * each, True, n),
            linear(e, wide, model.bias, n - first_places(model), gains),
            linear(wide, e, model.bias, n, gains),
            Cost(0, 10 * wide * each * n),  # four corners and a weight for every point
        ]
