"""Which samples a step lost or repeated, found from the sums that its record holds.

A record is three sums, so not every fault can be read from it. Those that happen can: a run of consecutive draws that
is missing, that was used once more, or that stands in the place of another run (a cursor that went back or ahead, a
rank that read another's rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from headway.pretrain.data.samples import Ints
from headway.pretrain.data.used import Used

Keys = Callable[[Ints], Ints]
"""Keys of the samples of some draws."""


class Change(NamedTuple):
    """Draws that a step should have used and did not, and those that it used beyond its own."""

    lost: range
    gained: range


def explain(first: int, expected: Used, found: Used, keys: Keys) -> Change | None:
    """What turns the expected sums into those that were found; None if nothing of the kinds above does.

    Args:
        first: the step's first draw; it should have used `expected.rows` from there.
        keys: of any draws from 0 on.
    """
    n, more, shift = expected.rows, found.rows - expected.rows, found.draws - expected.draws
    digest = (found.digest - expected.digest) % (1 << 64)
    none = range(0)
    if more:
        run = _run(abs(more), shift if more > 0 else -shift)
        if run is None:
            return None
        change = Change(none, run) if more > 0 else Change(run, none)
        return change if (_sum(keys, change.gained) - _sum(keys, change.lost)) % (1 << 64) == digest else None
    for length in (d for d in range(n, 0, -1) if shift and shift % d == 0):
        by = shift // length
        begin = max(first, -by)  # no draw lies before 0
        if first + n - begin < length:
            continue
        own, other = (_prefix_sums(keys, range(f, f + first + n - begin)) for f in (begin, begin + by))
        differences = (other[length:] - other[:-length]) - (own[length:] - own[:-length])
        for start in np.flatnonzero(differences == np.uint64(digest)).tolist():
            lost = range(begin + start, begin + start + length)
            return Change(lost, range(lost.start + by, lost.stop + by))
    return None


def _run(length: int, total: int) -> range | None:
    """The run of so many draws whose sum is `total`."""
    start, rest = divmod(total - length * (length - 1) // 2, length)
    return range(start, start + length) if rest == 0 and start >= 0 else None


def _sum(keys: Keys, draws: range) -> int:
    return int(_prefix_sums(keys, draws)[-1])


def _prefix_sums(keys: Keys, draws: range) -> np.ndarray:
    """uint64 [n + 1], modulo 2^64."""
    values = keys(np.arange(draws.start, draws.stop)).astype(np.uint64)
    return np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
