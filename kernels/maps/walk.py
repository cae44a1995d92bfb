"""Blocks of maps: rows of some heads of some samples against all keys that they may see, and memory for them.

A block's temporaries stay in the caches, and all blocks use the same memory: what is fresh costs page faults.

Shapes: B batch, H student heads, Q queries, K keys of a block, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels.maps.operands import Scores, Seen

ROWS = 128
"""Rows of a block: the products of fewer are slower."""
SIZE = 1 << 18
"""Numbers of a block, as far as one head's rows leave a choice: 1 MiB in fp32."""
LONG = 2048
"""Keys from which a block leaves the caches whatever its rows: then fewer and larger ones save a sixth of the time."""


@dataclass(frozen=True)
class Block:
    """A block, [B, H, Q, K], of some of everything.

    Attributes:
        samples, heads, queries, keys: which.
        sure: so many of the first keys are seen by all rows.
        hidden: of the keys after these those that are not seen, bool [1 or B, 1, Q, K]; None if all are.
    """

    samples: slice
    heads: slice
    queries: slice
    keys: slice
    sure: int
    hidden: Tensor | None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        parts = self.samples, self.heads, self.queries, self.keys
        b, h, q, k = (part.stop - part.start for part in parts)
        return b, h, q, k

    def counts(self, device: torch.device) -> Tensor:
        """Keys that the rows see, int64 [1 or B, 1, 1 or Q]."""
        if self.hidden is None:
            return torch.full((1, 1, 1), self.shape[3], device=device)
        return self.shape[3] - self.hidden.sum(-1)

    def rows(self, x: Tensor) -> Tensor:
        """The block's part of [B, H, Q, ...]."""
        return x[self.samples, self.heads, self.queries]

    def flat(self, x: Tensor, places: slice) -> Tensor:
        """A view of the block's part of [B, H, S, D], samples and heads in one dim, at these places."""
        return x[self.samples, self.heads].flatten(0, 1)[:, places]


def walk(student: Scores, seen: Seen) -> Iterator[Block]:
    """All blocks; those of the same rows and keys in a row."""
    (batch, heads, length, _), total = student.q.shape, student.k.shape[2]
    rows, numbers = (ROWS, SIZE) if total < LONG else (2 * ROWS, 4 * SIZE)
    size = max(1, min(rows, length) * total)  # of a head's rows
    some_heads, some = min(heads, max(1, numbers // size)), max(1, numbers // (size * heads))
    for samples in cut(batch, some):
        within = seen.of(samples)
        for queries in cut(length, rows):
            keys = within.mask.keys_of(queries, total)
            sure = within.sure(queries, keys)
            found = within.block(student, queries, slice(keys.start + sure, keys.stop))
            hidden = None if found is None else ~found
            for part in cut(heads, some_heads):
                yield Block(samples, part, queries, keys, sure, hidden)


def cut(total: int, size: int) -> Iterator[slice]:
    """Runs of `size` and a last one of what is left."""
    return (slice(start, min(total, start + size)) for start in range(0, total, size))


class Memory:
    """Memory that all blocks use: by number, in the given dtype."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flat: dict[tuple[int, torch.dtype], Tensor] = {}

    def of(self, number: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of any content; a tensor of the same number and dtype that was given before is lost."""
        size = torch.Size(shape).numel()
        flat = self.flat.get((number, dtype))
        if flat is None or flat.numel() < size:
            flat = self.flat[number, dtype] = torch.empty(size, dtype=dtype, device=self.device)
        return flat[:size].view(shape)
