"""Writing a cache: each process adds rows to its own part, and one of them publishes the whole.

Shapes: `n` samples.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.pretrain.data.teacher_cache.buffer import Buffer
from headway.pretrain.data.teacher_cache.contents import MANIFEST, PART, Contents, check_description
from headway.pretrain.data.teacher_cache.disk import disk_errors, replace_synced, sync_folder
from headway.pretrain.data.teacher_cache.fields import KEY_FIELD, Bits, Fields, Ints, key_array, to_bits
from headway.pretrain.data.teacher_cache.index import ABSENT, Index, conflict, extended
from headway.pretrain.data.teacher_cache.publish import part_name, publish, read_parts, staging
from headway.pretrain.data.teacher_cache.shards import LONGEST, Shards, write_shard
from headway.pretrain.errors import DataError

SHARD_BYTES = 256 << 20
"""Rows of this many bytes make a shard, unless told otherwise. It is held in memory, and lost if the process dies."""


class CacheWriter:
    """Writes one part of a cache; a context manager. Its end without a fault is `close`.

    `CacheWriter(...)` begins a part, `CacheWriter.resume(...)` goes on with what an interrupted writing left.

    Args:
        folder: where the cache will be once published; until then all lies in `.NAME.unfinished` beside it.
        identity: JSON values on which the content depends; equal in all parts.
        fields: what a row holds; equal in all parts.
        part: number of this process among those that write, from 0.
        shard_rows: rows of a shard; as many as fit into `SHARD_BYTES` if not given.

    Raises:
        DataError: the cache or the part exists already, another process writes the part, or the disk cannot be written.
        JobError: parts that are there have another identity or other fields; names the first entry.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        folder: str | Path,
        identity: Mapping[str, Any],
        fields: Fields,
        *,
        part: int = 0,
        shard_rows: int | None = None,
    ) -> None:
        if (path := staging(Path(folder)) / part_name(part)).exists():
            rule = "an interrupted writing left it: go on with CacheWriter.resume, or delete the folder"
            raise DataError(f"{path}: {rule}")
        self._begin(Path(folder), identity, fields, part, shard_rows)

    @classmethod
    def resume(
        cls,
        folder: str | Path,
        identity: Mapping[str, Any],
        fields: Fields,
        *,
        part: int = 0,
        shard_rows: int | None = None,
    ) -> CacheWriter:
        """Go on with what an interrupted writing left, in any number of parts, or begin if it left nothing.

        Whole shards are kept, also those of other parts: `has` knows their keys.
        """
        writer = cls.__new__(cls)
        writer._begin(Path(folder), identity, fields, part, shard_rows)
        return writer

    def has(self, keys: Tensor | Ints) -> Tensor:
        """Which of these keys need no row any more: bool [n].

        Known are this writer's own rows, and those of whole shards that any part had when this writer opened.
        """
        wanted = key_array(keys)
        return torch.from_numpy((self._index.find(wanted) != ABSENT) | self._buffer.has(wanted))

    def add(self, keys: Tensor | Ints, rows: Mapping[str, Tensor]) -> None:
        """Add the rows of samples; a key that is there already, with the same bits, is passed over.

        Args:
            keys: int64 [n].
            rows: name of every field -> [n, *shape], on any device.

        Raises:
            DataError: a key was given before with other bits, or the disk cannot be written.
            ValueError: a name, a number of rows, a shape or a number does not fit the fields.
        """
        wanted, fields = key_array(keys), self._contents.fields
        if not self._writing:
            raise ValueError(f"{self._path}: this writer is closed; go on with CacheWriter.resume")
        if rows.keys() != fields.keys():
            raise ValueError(f"rows: given are {sorted(rows)}, the fields are {sorted(fields)}")
        bits = {name: to_bits(rows[name], field, name) for name, field in fields.items()}
        for name, array in bits.items():
            if len(array) != len(wanted):
                raise ValueError(f"{name}: {len(array)} rows for {len(wanted)} keys")
        for i in range(len(wanted)):
            self._add(wanted[i : i + 1], {name: array[i] for name, array in bits.items()})

    def close(self) -> None:
        """Write what is left and mark the part complete. Raises DataError if the disk cannot be written."""
        if self._writing:
            try:
                self._save()
                self._list(complete=True)
            finally:
                self._release()

    def publish(self, parts: int = 1) -> Path:
        """Close, and give the cache its name; called by one process, once all have closed their parts.

        Args:
            parts: how many processes wrote: parts 0 to `parts` - 1 must be complete. Whole shards that others left,
                of an interrupted writing with more processes, are taken too.

        Returns:
            The folder of the cache.

        Raises:
            DataError: a part is missing or not complete, parts hold different rows of one key, nothing was written,
                or the disk cannot be written.
            JobError: parts have different identities or fields.
        """
        self.close()
        return publish(self._folder, replace(self._contents, shards=()), parts)

    def __enter__(self) -> CacheWriter:
        return self

    def __exit__(self, fault: type[BaseException] | None, *_: object) -> None:
        if fault is None:
            self.close()
        else:
            self._release()

    def _begin(
        self, folder: Path, identity: Mapping[str, Any], fields: Fields, part: int, shard_rows: int | None
    ) -> None:
        check_description(identity, fields)
        if part < 0:
            raise ValueError(f"part = {part}: parts are numbered from 0")
        row = KEY_FIELD.nbytes + sum(field.nbytes for field in fields.values())
        size = max(1, SHARD_BYTES // row) if shard_rows is None else shard_rows
        if not 0 < size <= LONGEST:
            raise ValueError(f"shard_rows = {shard_rows}: must be 1 to {LONGEST}")
        if folder.exists():
            raise DataError(f"{folder}: exists already; delete it to make the cache again")
        self._folder, self._path = folder, staging(folder) / part_name(part)
        self._contents = Contents(dict(identity), dict(fields))
        self._lock_part()
        try:
            self._learn()
            self._list(complete=False)
        except BaseException:
            self._release()
            raise
        self._buffer = Buffer(self._contents.fields, size)

    def _lock_part(self) -> None:
        """Make the part's folder and hold its lock, which the kernel releases if the process dies."""
        with disk_errors(self._path):
            self._path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._path, os.O_RDONLY)
        self._writing = True
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise DataError(f"{self._path}: another process writes this part; each has its own") from None
        except OSError:
            pass  # file systems without locks (some mounts of Lustre and NFS): this mistake is not noticed there

    def _learn(self) -> None:
        """Find out what all parts hold."""
        root = self._path.parent
        with disk_errors(root):
            # Of a publishing that was killed, and about to be untrue.
            (root / MANIFEST).unlink(missing_ok=True)
        parts = read_parts(root, self._contents)
        if self._path.name in parts:
            self._contents = replace(self._contents, shards=parts[self._path.name].shards)
        self._shards = Shards(
            root, self._contents.fields, tuple(shard for found in parts.values() for shard in found.shards)
        )
        self._index = extended(Index(), self._shards, range(len(self._shards.shards)))

    def _add(self, key: Ints, row: Mapping[str, Bits]) -> None:
        """Add one row, unless it is there: key int64 [1]."""
        place, number = int(self._index.find(key)[0]), int(key[0])
        if place != ABSENT:
            differing = self._shards.differing(place, row)
        elif self._buffer.has(key)[0]:
            differing = self._buffer.differing(number, row)
        else:
            self._buffer.put(number, row)
            if self._buffer.full:
                self._save()
            return
        if differing is not None:
            raise DataError(conflict(self._path, number, differing))

    def _save(self) -> None:
        """Write the rows that are in memory as a shard, and list it once it is on disk."""
        if not len(self._buffer):
            return
        file = f"{self._path.name}/shard_{len(self._contents.shards):05d}.safetensors"
        with disk_errors(self._path):
            shard = write_shard(self._path.parent, file, self._contents.fields, self._buffer.arrays())
        self._contents = replace(self._contents, shards=(*self._contents.shards, shard))
        self._list(complete=False)
        self._shards.shards.append(shard)
        self._index = extended(self._index, self._shards, [len(self._shards.shards) - 1])
        self._buffer.clear()

    def _list(self, complete: bool) -> None:
        """Write `part.json`."""
        with disk_errors(self._path):
            replace_synced(self._path / PART, replace(self._contents, complete=complete).dump())
            sync_folder(self._path.parent)

    def _release(self) -> None:
        if self._writing:
            self._writing = False
            os.close(self._lock)
