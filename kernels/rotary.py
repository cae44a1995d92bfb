"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Hugging Face.

Feature i turns with feature i + D/2. The paper's own layout turns neighbours (2i, 2i + 1) instead: the two are a
permutation of weights apart, and not interchangeable.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, fp32 (fp64 for fp64) [S, D/2] or [B, S, D/2]."""

    cos: Tensor
    sin: Tensor


def rotation(positions: Tensor, dim: int, base: float, dtype: torch.dtype = torch.float32) -> Rotation:
    """Angles position / base^(2i / dim), computed in fp64: fp32 angles are off by 1e-3 at position 10^4.

    Args:
        positions: int64 [S] or [B, S].
        dim: head dimension, even.
        base: 10,000 in the paper.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim
    angles = positions.double().unsqueeze(-1) * base**-exponents
    return Rotation(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn feature pairs of x [B, H, S, D] by each position's angles; returns x's dtype."""
    cos, sin = (t if t.dim() == 2 else t.unsqueeze(1) for t in turn)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
