"""Shard files: many rows in the safetensors format, written and hashed in one pass, read through memory maps.

Written here rather than by `safetensors.torch.save`, which holds several copies of a shard and leaves hashing to a
second pass; the bytes are the same (a test compares them). Places: see the package.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path

import numpy as np

from headway.pretrain.data.teacher_cache.contents import Shard
from headway.pretrain.data.teacher_cache.disk import check_size, write_synced
from headway.pretrain.data.teacher_cache.fields import CODES, KEY, KEY_FIELD, Bits, Field, Fields, Ints
from headway.pretrain.errors import DataError

ROW_BITS = 32
"""A place is (number of the shard << ROW_BITS) + row within the shard."""
LONGEST = (1 << 31) - 1
"""Rows of a shard at most."""
MAPPED = 128
"""Shards mapped at once: each holds a file descriptor, of which a process usually may have 1024."""

_ORDER = list(CODES)


def arrange(fields: Fields, rows: int) -> dict[str, tuple[Field, int]]:
    """Arrays of a shard in their order in the file: name -> (field, first byte, counted after the header)."""
    every = {KEY: KEY_FIELD, **fields}
    places, at = {}, 0
    for name in sorted(every, key=lambda name: (_ORDER.index(every[name].dtype), name)):
        places[name] = every[name], at
        at += rows * every[name].nbytes
    return places


def header(fields: Fields, rows: int) -> bytes:
    """Head of a shard file: length and JSON as safetensors has them, padded so that the arrays start at 8 n."""
    table = {
        name: {
            "dtype": CODES[field.dtype],
            "shape": [rows, *field.shape],
            "data_offsets": [at, at + rows * field.nbytes],
        }
        for name, (field, at) in arrange(fields, rows).items()
    }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shard(root: Path, file: str, fields: Fields, arrays: Mapping[str, Bits]) -> Shard:
    """Write and sync a shard: `arrays` are [rows, *shape] of `key` and of each field. Raises OSError."""
    rows = len(arrays[KEY])
    blocks = [memoryview(header(fields, rows))]
    blocks += [arrays[name].data.cast("B") for name in arrange(fields, rows)]
    return Shard(file, rows, sum(map(len, blocks)), write_synced(root / file, blocks))


class Shards:
    """Whole shards by number; a file is mapped when it is first read.

    Args:
        root: folder of the cache.
        fields: what a row holds.
        shards: their files.

    Raises:
        DataError: a file is missing or has another size than was written.
    """

    def __init__(self, root: Path, fields: Fields, shards: tuple[Shard, ...]) -> None:
        self.root, self.fields, self.shards = root, fields, list(shards)
        for shard in shards:
            check_size(root / shard.file, shard.bytes)
        # Not of a bound method: in a cycle of references, files would stay open until it is collected.
        self._mapped = lru_cache(maxsize=MAPPED)(partial(_map, root, fields, self.shards))

    def keys(self, number: int) -> Ints:
        """Keys of a shard's rows, as they lie: int64 [rows]."""
        return self._mapped(number)[KEY]

    def places(self, number: int) -> Ints:
        """Places of a shard's rows: int64 [rows]."""
        return (number << ROW_BITS) + np.arange(self.shards[number].rows, dtype=np.int64)

    def row(self, place: int, name: str) -> Bits:
        """One field of one row, [*shape]: a read-only view of the file, so that only what is used of it is read."""
        return self._mapped(place >> ROW_BITS)[name][place & ((1 << ROW_BITS) - 1)]

    def differing(self, place: int, row: Mapping[str, Bits]) -> str | None:
        """Name of the first field in which the row at this place has other bits than `row`."""
        for name in self.fields:
            if not np.array_equal(self.row(place, name), row[name]):
                return name
        return None


def _map(root: Path, fields: Fields, shards: list[Shard], number: int) -> dict[str, Bits]:
    """Arrays of a shard, each [rows, *shape], as views of the mapped file. Raises DataError if it is another file."""
    shard = shards[number]
    path, head = root / shard.file, header(fields, shard.rows)
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as fault:
        raise DataError(f"{path}: cannot be mapped: {fault}") from fault
    if mapped[: len(head)] != head:
        raise DataError(f"{path}: damaged: its header is not one of {shard.rows} rows of this cache's fields")
    return {
        name: np.ndarray((shard.rows, *field.shape), field.bits, mapped, len(head) + at)
        for name, (field, at) in arrange(fields, shard.rows).items()
    }
