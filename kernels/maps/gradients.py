"""Gradients of queries, keys and bias, added up over blocks in fp32 (fp64 for fp64).

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.maps.pair import SPARE, Pair
from headway.kernels.maps.walk import Block


class Wanted(NamedTuple):
    """Which gradients are."""

    q: bool
    k: bool
    bias: bool


class Gradients:
    """Sums over blocks.

    Args:
        pair: whose student's they are.
        wanted: which.
    """

    def __init__(self, pair: Pair, wanted: Wanted) -> None:
        q, k, _, bias = pair.student
        self.pair = pair
        self.dq = torch.zeros_like(q, dtype=pair.wide) if wanted.q else None
        self.dk = torch.zeros_like(k, dtype=pair.wide) if wanted.k else None
        self.d_bias = (
            torch.zeros_like(bias, dtype=pair.wide) if wanted.bias and isinstance(bias, Tensor) else None
        )

    def add(self, block: Block, slope: Tensor, weight: Tensor | None) -> None:
        """Add a block's.

        Args:
            block: where.
            slope: gradient by the scores, [B, H, Q, K]; may be written over.
            weight: of rows, [1 or B, 1 or H, Q]; None is 1.
        """
        q, k, *_ = self.pair.student
        part, flat = block.flat(q, block.queries), slope.flatten(0, 1)
        weight = None if weight is None else weight.unsqueeze(-1)
        if q.dtype != slope.dtype:
            flat = self.pair.memory.of(SPARE, tuple(flat.shape), q.dtype).copy_(flat)
        if self.dq is not None:
            _add(block.flat(self.dq, block.queries), flat, block.flat(k, block.keys))
            if weight is not None:
                block.rows(self.dq).mul_(weight)
        if self.dk is not None:
            if weight is not None:  # a weight of rows is cheaper on queries than on the block
                part = (block.rows(q) * weight).to(q.dtype).flatten(0, 1)
            _add(block.flat(self.dk, block.keys), flat.mT, part)
        if self.d_bias is not None:
            if weight is not None:
                slope *= weight
            self.d_bias[block.heads, block.queries, block.keys] += slope.sum(0)

    def total(self, factor: float) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """dq [B, H, Q, D], dk [B, K, S, D] and d_bias [H, Q, S] times a factor. Keys' gradients are sums over the
        query heads that share them. Ends the sums."""
        scale = self.pair.student.scale
        dk = self.dk
        if dk is not None:
            dk = dk.unflatten(1, (self.pair.key_heads, -1)).sum(2).mul_(factor * scale)
        dq = None if self.dq is None else self.dq.mul_(factor * scale)
        return dq, dk, None if self.d_bias is None else self.d_bias.mul_(factor)


def _add(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right, in the total's dtype."""
    if left.dtype == total.dtype:
        total.baddbmm_(left, right)
    else:
        total += torch.bmm(left, right)
