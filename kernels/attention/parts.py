"""Blocks of queries with the keys that they may see by their places: what kernels go through.

Shapes: B batch, H heads, Q queries, K keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import joined
from headway.kernels.attention.slopes import Bias, Slopes


@dataclass(frozen=True)
class Part:
    """A block of queries and runs of keys, as slices of the whole, in steps of one size.

    Attributes:
        queries: which they are.
        runs: the keys', in order, disjoint.
        mask: of the whole sequences.
        lengths: of queries and keys.
    """

    queries: slice
    runs: tuple[slice, ...]
    mask: Mask
    lengths: tuple[int, int]

    @property
    def keys(self) -> int:
        """How many there are."""
        return sum(-((run.start - run.stop) // (run.step or 1)) for run in self.runs)

    @cached_property
    def numbers(self) -> Tensor:
        """The keys' places, int64 [K]."""
        return torch.cat([torch.arange(run.start, run.stop, run.step or 1) for run in self.runs])

    def take(self, x: Tensor, dim: int) -> Tensor:
        """The keys' elements of a tensor."""
        if len(self.runs) > FEW:
            return x.index_select(dim, self.numbers.to(x.device))
        found = [_narrow(x, dim, run) for run in self.runs]
        return found[0] if len(found) == 1 else torch.cat(found, dim)

    def add(self, total: Tensor, x: Tensor, dim: int) -> None:
        """Add what belongs to the keys to the whole's."""
        if len(self.runs) > FEW:
            total.index_add_(dim, self.numbers.to(x.device), x.to(total.dtype))
            return
        start = 0
        for run in self.runs:
            there = _narrow(total, dim, run)
            there += x.narrow(dim, start, there.shape[dim])
            start += there.shape[dim]

    def bias(self, bias: Bias, heads: slice = slice(None)) -> Tensor:
        """This block of a bias [H, Q, K] or of what describes one, of some heads."""
        if isinstance(bias, Slopes):
            return Slopes(bias.slopes[heads], bias.queries[self.queries], self.take(bias.keys, 0)).block()
        return self.take(bias[heads, self.queries], 2)

    def seen(self, device: torch.device, rows: slice) -> Tensor | None:
        """The mask of this block, for some rows of the batch; see `lower`."""
        mask = self.mask
        if mask.documents is not None:
            theirs = mask.key_documents
            theirs = None if theirs is None else theirs[rows]
            mask = mask._replace(documents=mask.documents[rows], key_documents=theirs)
        if mask.prefix is not None:
            mask = mask._replace(prefix=mask.prefix[rows])
        keys = self.runs[0] if len(self.runs) == 1 else self.numbers.to(device)
        return lower(mask, *self.lengths, device, self.queries, keys)

    def kept(self, dropout: WeightDropout, rows: slice, heads: slice) -> Tensor:
        """Which weights are kept, bool [B, H, Q, K], of some rows of the batch and heads."""
        first = dropout.first_head + heads.start
        some = dropout._replace(slots=dropout.slots[rows], first_head=first)
        count = heads.stop - heads.start
        columns = [
            some.kept(count, self.queries, slice(run.start, run.stop))[..., :: run.step or 1]
            for run in self.runs
        ]
        return columns[0] if len(columns) == 1 else torch.cat(columns, -1)


def parts(mask: Mask, queries: int, keys: int, rows: int | None = None) -> Iterator[Part]:
    """All queries in blocks.

    Args:
        mask: of whole sequences (no `shift`).
        queries, keys: how many there are.
        rows: queries of a block at most; as many as suit the scope if not given.
    """
    assert mask.shift is None
    scope = mask.scope
    step = 1 if scope is None else scope.step
    rows = min(rows or ROWS, ROWS if scope is None else scope.rows) * step
    for start in range(0, queries, rows):
        stop = min(queries, start + rows)
        last = stop if mask.triangular else keys
        ranges = [range(last)] if scope is None else scope.ranges(range(start, stop), keys, mask.triangular)
        runs = joined(ranges, 0, last)
        for offset in range(min(step, stop - start)):
            if step == 1:
                yield Part(slice(start, stop), tuple(runs), mask, (queries, keys))
                continue
            place = (start + offset) % step  # of the keys that are a multiple of the step away
            combs = tuple(slice(run.start + (place - run.start) % step, run.stop, step) for run in runs)
            combs = tuple(run for run in combs if run.start < run.stop)
            if combs:
                yield Part(slice(start + offset, stop, step), combs, mask, (queries, keys))


ROWS = 128
"""Queries of a block: suits the caches of CPUs."""


FEW = 8
"""Runs that are gathered one by one."""


def _narrow(x: Tensor, dim: int, run: slice) -> Tensor:
    return x[(slice(None),) * dim + (run,)]
