"""Attention to channels and places of an image: gates and convolutions over its grid of patches.

A row holds `first` tokens that have no place on the grid (up to 2: class token, distillation token), then the patches
of a square grid, row by row. Squeezing, pooling and convolving is done over patches alone; a gate of channels scales
the `first` tokens too, which hear of the image through it, a gate of places does not, and convolutions pass them by (as
CvT's code the class token).

Shapes: B batch, S places, N patches, E hidden size, R side of the grid, K side of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Excite = Callable[[Tensor], Tensor]
"""[B, E] -> [B, E]: two linear layers with a ReLU between them."""


def as_map(x_BNE: Tensor) -> Tensor:
    """Patches as a map [B, E, R, R]."""
    side = math.isqrt(x_BNE.shape[1])
    assert side * side == x_BNE.shape[1], "the patches must fill a square grid"
    return x_BNE.transpose(1, 2).unflatten(2, (side, side))


def squeeze_excite(x_BSE: Tensor, first: int, excite: Excite) -> Tensor:
    """x sigmoid(excite(mean of x)): a gate of channels (Hu et al. 2018, equations 2 to 4); O(N E).

    Args:
        x_BSE: `first` tokens, then patches.
        first: tokens that have no place on the grid.
        excite: the two layers.
    """
    return x_BSE * torch.sigmoid(excite(x_BSE[:, first:].mean(1))).unsqueeze(1)


def cbam(x_BSE: Tensor, first: int, excite: Excite, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A gate of channels, then one of places (Woo et al. 2018, equations 1 to 3); O(N (E + K^2)).

    Channels: sigmoid(excite(mean) + excite(max)). Places: sigmoid of a convolution of the mean and the maximum over
    channels, zeros beyond the border. The paper's batch norm after that convolution is left out.

    Args:
        x_BSE, first, excite: see `squeeze_excite`.
        weight: [1, 2 K K] of the convolution: of the mean, then of the maximum, row by row.
        bias: [1].
    """
    patches = x_BSE[:, first:]
    x_BSE = x_BSE * torch.sigmoid(excite(patches.mean(1)) + excite(patches.amax(1))).unsqueeze(1)
    patches = x_BSE[:, first:]
    described_B2RR = as_map(torch.stack((patches.mean(2), patches.amax(2)), 2))
    side = math.isqrt(weight.shape[1] // 2)
    kernel = weight.view(1, 2, side, side).to(x_BSE.dtype)
    gate_B1RR = F.conv2d(
        described_B2RR, kernel, None if bias is None else bias.to(x_BSE.dtype), padding=side // 2
    )
    gated = patches * torch.sigmoid(gate_B1RR).flatten(1).unsqueeze(2)
    return torch.cat((x_BSE[:, :first], gated), 1) if first else gated


def convolved_reference(x_BSE: Tensor, first: int, weight: Tensor, stride: int = 1) -> Tensor:
    """The specification of `convolved`: a sum of shifted maps, one for every place of the convolution."""
    side, x_BERR = math.isqrt(weight.shape[1]), as_map(x_BSE[:, first:])
    rows = x_BERR.shape[2]
    padded, total = F.pad(x_BERR, (side // 2,) * 4), torch.zeros_like(x_BERR)
    for i in range(side):
        for j in range(side):
            total = total + weight[:, i * side + j, None, None] * padded[:, :, i : i + rows, j : j + rows]
    total = total[:, :, ::stride, ::stride]
    return torch.cat((x_BSE[:, :first], total.flatten(2).transpose(1, 2)), 1)


def convolved(x_BSE: Tensor, first: int, weight: Tensor, stride: int = 1) -> Tensor:
    """Each channel convolved by itself, zeros beyond the border (Wu et al. 2021, section 3.2); O(N E K^2).

    Args:
        x_BSE, first: see `squeeze_excite`; the `first` tokens are passed on as they are.
        weight: [E, K K], row by row.
        stride: every so many places of a row, and of a column, are computed.

    Returns:
        [B, first + ceil(R / stride)^2, E].
    """
    side = math.isqrt(weight.shape[1])
    kernel = weight.view(-1, 1, side, side).to(x_BSE.dtype)
    maps = F.conv2d(
        as_map(x_BSE[:, first:]), kernel, stride=stride, padding=side // 2, groups=kernel.shape[0]
    )
    patches = maps.flatten(2).transpose(1, 2)
    return torch.cat((x_BSE[:, :first], patches), 1) if first else patches
