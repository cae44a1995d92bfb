"""How far roundings carry attention and its gradients: sums of what is off independently, by standard deviations.

Roundings are taken for independent and of zero mean, so a sum is off by the root of its terms' squares, not by their
sum (Higham and Mary 2019, A new approach to probabilistic rounding error analysis). What is rounded to nearest is off
by at most a roundoff u, evenly: by u / sqrt(3) of itself. A bound is `FAR` standard deviations, and u of the largest
result, which is rounded last.

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FAR = 6.0
"""Standard deviations: of a million numbers none is so far off by chance."""


class Off(NamedTuple):
    """By how much something [B, H, Q, S] is off: `each` of every number for itself, `row` [B, H, Q, 1] times `along`
    [B, H, Q, S] of all numbers of a row together. Standard deviations."""

    each: Tensor
    row: Tensor
    along: Tensor


def products_off(x_BHQD: Tensor, y_BKSD: Tensor, scale: float = 1.0) -> Tensor:
    """Of scale x y^T in fp32, [B, H, Q, S]: D partial sums grow as a walk, from nothing to sqrt(sum (x y)^2), and each
    is rounded; the result is so once more, and what is made of it as if it were 1."""
    y = per_query_head(y_BKSD, x_BHQD)
    walk = scale * (x_BHQD**2 @ (y**2).mT * x_BHQD.shape[-1] / 2).sqrt()
    return 2.0**-24 * ((walk + scale * (x_BHQD @ y.mT).abs()) / 3**0.5 + 1)


def bound(spread: Tensor, wanted: Tensor, dtype: torch.dtype) -> float:
    """For a result whose standard deviations are these."""
    return float((FAR * spread + ROUNDING[dtype] * wanted.abs()).max())


def sums_over_keys(off: Off, x_BKSD: Tensor, wanted_BHQD: Tensor, dtype: torch.dtype) -> float:
    """A bound for sums over keys of what is off times x."""
    x = per_query_head(x_BKSD, wanted_BHQD)
    spread = (off.each**2 @ x**2).sqrt() + off.row * (off.along @ x).abs()
    return bound(spread, wanted_BHQD, dtype)


def sums_over_queries(off: Off, x_BHQD: Tensor, wanted_BKSD: Tensor, dtype: torch.dtype) -> float:
    """A bound for sums, over queries and the heads of a group, of what is off times x."""
    squares = (off.each**2 + (off.row * off.along) ** 2).mT @ x_BHQD**2
    grouped = squares.unflatten(1, (wanted_BKSD.shape[1], -1)).sum(2)
    return bound(grouped.sqrt(), wanted_BKSD, dtype)
