"""Multi-scale deformable attention (Zhu et al. 2021, equation 3): a query reads a few places of each level's map, where
and how much it says itself; between places values are interpolated bilinearly, and are 0 outside. O(Q H L P D).

Coordinates are fractions (x, y) of the map's sides: (0, 0) is its corner, (1/2, 1/2) its centre, and the centre of
row r and column c of R x C places is ((c + 1/2) / C, (r + 1/2) / R), as in the authors' code.

Shapes: B batch, Q queries, H heads, L levels, P points, D head dimension, R rows and C columns of a level, E hidden.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def reference(levels: Sequence[Tensor], places_BQHLP2: Tensor, weights_BQHLP: Tensor) -> Tensor:
    """The specification: a place reads all of a map, each by max(0, 1 - |dx|) max(0, 1 - |dy|); O(Q H L P R C).

    Args:
        levels: values [B, H, D, R, C] of each level.
        places_BQHLP2: x and y, see above.
        weights_BQHLP: of the points; sum to 1 over L and P.

    Returns:
        [B, H, Q, D].
    """
    out = []
    for i, value_BHDRC in enumerate(levels):
        rows, columns = value_BHDRC.shape[-2:]
        x, y = (places_BQHLP2[:, :, :, i, :, a, None] for a in (0, 1))
        near_x = (1 - (x * columns - 0.5 - torch.arange(columns, device=x.device)).abs()).clamp(min=0)
        near_y = (1 - (y * rows - 0.5 - torch.arange(rows, device=x.device)).abs()).clamp(min=0)
        near = torch.einsum("bqhp,bqhpr,bqhpc->bhqrc", weights_BQHLP[:, :, :, i], near_y, near_x)
        out.append(torch.einsum("bhqrc,bhdrc->bhqd", near, value_BHDRC.to(near.dtype)))
    return torch.stack(out).sum(0).to(levels[0].dtype)


def attention(levels: Sequence[Tensor], places_BQHLP2: Tensor, weights_BQHLP: Tensor) -> Tensor:
    """As `reference`, by torch's `grid_sample`, in the dtype of the places."""
    out, wide = [], places_BQHLP2.dtype
    for i, value_BHDRC in enumerate(levels):
        grid = (2 * places_BQHLP2[:, :, :, i] - 1).transpose(1, 2).flatten(0, 1)  # [B H, Q, P, 2]
        found = F.grid_sample(value_BHDRC.to(wide).flatten(0, 1), grid, align_corners=False)
        weights = weights_BQHLP[:, :, :, i].transpose(1, 2).flatten(0, 1)  # [B H, Q, P]
        out.append((found * weights.to(wide).unsqueeze(1)).sum(-1))
    total: Tensor = torch.stack(out).sum(0).transpose(1, 2)
    return total.unflatten(0, levels[0].shape[:2]).to(levels[0].dtype)


def ring(heads: int, points: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Offsets before anything is learned, in places, [H, P, 2]: head h looks in its own direction, and its point p
    goes p + 1 steps.

    The authors' begin at direction 0 with steps of a place on the larger axis. Their points stand exactly on places,
    where the slope of what is interpolated jumps, so that a rounding decides on the first gradients. So directions are
    turned by a third of what is between two of them, and a step is 1 / sqrt(2): no coordinate is ever rational.
    """
    angle_H = (torch.arange(heads, device=device, dtype=torch.float64) + 1 / 3) * (2 * math.pi / heads)
    way_H2 = torch.stack((angle_H.cos(), angle_H.sin()), -1)
    way_H2 = way_H2 / way_H2.abs().amax(-1, keepdim=True)
    steps_P = torch.arange(1, points + 1, device=device) / math.sqrt(2)
    return (way_H2[:, None] * steps_P[:, None]).to(dtype)


def centres(side: int, first: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Where the queries of a square grid stand, [first + side^2, 2]; the `first` ones, which have no place on it, in
    the middle: what they read is a matter of their offsets."""
    place = torch.arange(side * side, device=device)
    xy = torch.stack((place % side, place // side), -1).to(dtype).add(0.5).div(side)
    return F.pad(xy, (0, 0, first, 0), value=0.5)


def pyramid(value_BHDRC: Tensor, depth: int) -> list[Tensor]:
    """Values, and their means over 2 x 2, 4 x 4, ... places: `depth` levels, none below one place. Where a side is odd
    places share what lies between them, so that a level covers all of the map."""
    levels, side = [value_BHDRC], value_BHDRC.shape[-1]
    flat = value_BHDRC.flatten(0, 1)
    for level in range(1, depth):
        small = F.adaptive_avg_pool2d(flat, max(1, side >> level))
        levels.append(small.unflatten(0, value_BHDRC.shape[:2]))
    return levels
