"""The index of a cache: from a sample's key to the place of its row, in a mapped file, by binary search."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from headway.pretrain.data.teacher_cache.disk import check_size, write_synced
from headway.pretrain.data.teacher_cache.fields import Ints
from headway.pretrain.data.teacher_cache.shards import Shards
from headway.pretrain.errors import DataError

INDEX = "index.bin"
ENTRY = 16
"""Bytes of an entry: an int64 key, and, in the second half of the file, an int64 place."""
ABSENT = -1
NONE = np.zeros(0, np.int64)


class Index:
    """Places of keys.

    Args:
        keys: int64 [rows], strictly ascending.
        places: int64 [rows], where the row of each key lies.
    """

    def __init__(self, keys: Ints = NONE, places: Ints = NONE) -> None:
        self.keys, self.places = keys, places

    @classmethod
    def map(cls, folder: Path, rows: int) -> Index:
        """The index of a cache, memory-mapped: no entry is read. Raises DataError if it has another size."""
        path = folder / INDEX
        check_size(path, rows * ENTRY)
        halves = (np.memmap(path, "<i8", "r", at, (rows,)) for at in (0, rows * ENTRY // 2))
        return cls(*halves)

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: Ints) -> Ints:
        """Places of these keys, `ABSENT` for those that are not there: int64 [n]. Costs O(n log rows)."""
        if not len(self):
            return np.full(len(keys), ABSENT, np.int64)
        at = np.minimum(np.searchsorted(self.keys, keys), len(self) - 1)
        return np.where(self.keys[at] == keys, self.places[at], ABSENT)

    def write(self, folder: Path) -> str:
        """Write and sync the file; returns its sha256. Raises OSError."""
        halves = (np.ascontiguousarray(half, "<i8") for half in (self.keys, self.places))
        return write_synced(folder / INDEX, [half.data.cast("B") for half in halves])


def extended(index: Index, shards: Shards, numbers: Iterable[int]) -> Index:
    """The index, with all rows of the shards of these numbers. Sorts in memory: some 60 bytes a row.

    Of rows with the same key and the same bits the first is taken.

    Raises:
        DataError: two rows have the same key and differ.
    """
    numbers = list(numbers)
    keys = np.concatenate([index.keys, *(shards.keys(number) for number in numbers)])
    places = np.concatenate([index.places, *(shards.places(number) for number in numbers)])
    order = np.argsort(keys, kind="stable")
    return _distinct(shards, keys[order], places[order])


def _distinct(shards: Shards, keys: Ints, places: Ints) -> Index:
    """One entry of every key, of sorted keys."""
    repeats = np.flatnonzero(keys[1:] == keys[:-1])
    for before in repeats.tolist():
        one, other = int(places[before]), int(places[before + 1])
        name = shards.differing(one, {name: shards.row(other, name) for name in shards.fields})
        if name is not None:
            raise DataError(conflict(shards.root, int(keys[before]), name))
    first = np.ones(len(keys), bool)
    first[repeats + 1] = False
    return Index(keys[first], places[first])


def conflict(root: Path, key: int, name: str) -> str:
    """What is said of a key that was given two different rows."""
    rule = "a sample's key has one row: were these made by one teacher, which gives equal bits each time?"
    return f"{root}: key {key} was given twice, with different {name}: {rule}"
