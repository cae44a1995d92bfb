"""Dropout by global coordinates, and what a block adds it to. `random.keep` says which elements stay."""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.fused import fused
from headway.kernels.random import Coordinates, keep, kept_scale


def dropout(
    x: Tensor, p: float, key: Tensor, coordinates: Coordinates, residual: Tensor | None = None
) -> Tensor:
    """Zero elements of x with chance p and scale the others, by a mask that depends on coordinates alone.

    Args:
        x: [..., width].
        p: chance, rounded to a multiple of 2^-16; the scale uses the rounded value, so the mean is kept.
        key, coordinates: see `random.keep`. Hidden states [B, S, E] use (slot [B, 1], position [1, S], 0);
            attention weights [B, H, Q, K] use (slot [B, 1, 1], head [1, H, 1], query position [1, 1, Q]).
        residual: of x's shape, is added to what stays.
    """
    if x.dim() == 3 and fused(x, residual):
        from headway.kernels.triton import dropout as fast

        return fast.dropout(x, p, key, coordinates, residual=residual)
    y = torch.where(keep(key, p, coordinates, x.shape[-1]), x * kept_scale(p), 0)
    return y if residual is None else residual + y
