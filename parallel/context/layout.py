"""Which columns of a sequence are whose: zigzag chunks.

A sequence is cut into 2C chunks, and of C ranks rank r holds chunks r and 2C - 1 - r, so that under a causal mask all
ranks see as many keys (Llama 3, Dubey et al. 2024, section 3.3.2). A chunk is a run of neighbouring columns. Where 2C
does not divide the sequence, the first chunks are one longer; every rank has a column as long as there are C.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def runs(total: int, ranks: int, rank: int) -> tuple[range, ...]:
    """Places of a rank's columns, in order; runs that have none are left out."""
    base, longer = divmod(total, 2 * ranks)
    chunks = (rank, 2 * ranks - 1 - rank)
    begins = [base * i + min(i, longer) for i in range(2 * ranks + 1)]
    return tuple(range(begins[i], begins[i + 1]) for i in chunks if begins[i] < begins[i + 1])


@cache
def columns(total: int, ranks: int, rank: int) -> int:
    """How many columns of a sequence a rank has."""
    return sum(len(run) for run in runs(total, ranks, rank))


def places(total: int, ranks: int, rank: int, device: torch.device | str = "cpu") -> Tensor:
    """Places of a rank's columns, int64."""
    return torch.cat([torch.arange(r.start, r.stop, device=device) for r in runs(total, ranks, rank)])


def by_rank(total: int, ranks: int, device: torch.device | str = "cpu") -> Tensor:
    """Places of all columns, the first rank's first, int64 [total]."""
    return torch.cat([places(total, ranks, rank, device) for rank in range(ranks)])


def cuts(here: tuple[range, ...]) -> list[slice]:
    """Where each of some runs stands among the columns that they make together."""
    found, begin = [], 0
    for run in here:
        found.append(slice(begin, begin + len(run)))
        begin += len(run)
    return found
