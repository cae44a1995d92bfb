"""Dropout of attention weights in kernels, by global coordinates: what `dense.WeightDropout` keeps.

Shapes: B batch, Q queries; M queries and N keys of a tile.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from headway.kernels import random
from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.triton.philox import keep


class Drop(NamedTuple):
    """A `WeightDropout` as kernels take it; `key` None: nothing is dropped.

    Attributes:
        least: what an element's sixteen bits must reach.
        scale: of what is kept.
    """

    key: Any
    slots: Any
    positions: Any
    least: int
    scale: float
    first_head: int
    first_key: int


def drop_of(dropout: WeightDropout | None, kernel: str) -> Drop:
    """For a kernel of this name.

    Raises:
        KernelUnavailable: keys begin amid eight that are drawn at once.
    """
    if dropout is None:
        return Drop(None, None, None, 0, 1.0, 0, 0)
    if dropout.first_key % 8:
        rule = f"dropout needs a first key that 8 divides, not {dropout.first_key}"
        raise KernelUnavailable(kernel, rule, "reference")
    return Drop(
        dropout.key,
        dropout.slots.contiguous(),
        dropout.positions.contiguous(),
        random.threshold(dropout.p),
        random.kept_scale(dropout.p),
        dropout.first_head,
        dropout.first_key,
    )


@triton.jit
def kept(drop, b, h, first, first_key, queries, M: tl.constexpr, N: tl.constexpr):
    """Which weights of M queries from `first` on and N keys from `first_key` on are kept, [M, N]."""
    rows = first + tl.arange(0, M)
    slot = tl.load(drop.slots + b)
    position = tl.load(drop.positions + rows, mask=rows < queries, other=0)
    head = tl.full([M], 0, tl.int32) + h + drop.first_head
    key = tl.load(drop.key, volatile=True)  # else ten rounds' keys are kept in registers from tile to tile
    return keep(key, drop.least, slot, head, position, drop.first_key + first_key, M, N)
