"""Reading a cache: rows, or parts of rows, by the keys of samples.

Shapes: `n` samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.pretrain.data.teacher_cache.contents import MANIFEST, Contents, read_contents
from headway.pretrain.data.teacher_cache.disk import digest_problem
from headway.pretrain.data.teacher_cache.fields import Field, Ints, from_bits, key_array
from headway.pretrain.data.teacher_cache.index import ABSENT, INDEX, Index
from headway.pretrain.data.teacher_cache.shards import Shards
from headway.pretrain.errors import DataError

Slice = tuple[int, slice | Tensor]
"""A dim of a field's shape (0 is the first after the samples), and which of it: a slice, or indices int64 [m]."""


class TeacherCache:
    """A published cache. Cheap to open, to pickle and to share between processes.

    Attributes:
        folder: where it lies.
        identity: JSON values on which the content depends.
        fields: what a row holds.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self.folder, self.identity, self.fields = folder, contents.identity, contents.fields
        self._contents = contents
        self._index = Index.map(folder, contents.rows)
        self._shards = Shards(folder, contents.fields, contents.shards)

    @classmethod
    def open(cls, folder: str | Path) -> TeacherCache:
        """Open a cache; costs the manifest and one look at the size of each shard, whatever the number of rows.

        Raises:
            DataError: a file is missing, truncated, of another format, or the cache was never published.
        """
        path = Path(folder)
        return cls(path, read_contents(path / MANIFEST))

    def __reduce__(self) -> tuple[Any, ...]:
        return TeacherCache.open, (self.folder,)

    def __len__(self) -> int:
        """How many samples have a row."""
        return self._contents.rows

    def check(self, identity: Mapping[str, Any]) -> None:
        """Raise JobError naming the first entry in which the cache is not what a run needs.

        Args:
            identity: what the run needs: all entries of the cache's, named as settings are.
        """
        self._contents.check(self.folder, identity)

    def read(
        self,
        keys: Tensor | Ints,
        names: Sequence[str] | None = None,
        slices: Mapping[str, Slice] | None = None,
    ) -> dict[str, Tensor]:
        """Rows of these samples, in their order; a key may be asked for more than once.

        Args:
            keys: int64 [n].
            names: fields to be read; all if not given.
            slices: name of a field -> the part of it to be read; of the others all is. Pages of the files that hold
                nothing of what is asked are not touched.

        Returns:
            Name -> [n, *shape], on the CPU, in the dtype of its field.

        Raises:
            DataError: keys have no row; says how many, and the first.
            ValueError: a name, a dim or an index that the fields do not have.
        """
        wanted, chosen, slices = key_array(keys), list(self.fields if names is None else names), slices or {}
        for name in [*chosen, *slices]:
            if name not in self.fields:
                raise ValueError(f"{name!r} is no field of {self.folder}: it has {', '.join(self.fields)}")
        selected = {name: _selection(name, self.fields[name], slices.get(name)) for name in chosen}
        places = self._places(wanted)
        order = np.argsort(places, kind="stable").tolist()  # files are read from front to back
        rows = {}
        for name in chosen:
            select, shape = selected[name]
            out = np.empty((len(wanted), *shape), self.fields[name].bits)
            for i in order:
                out[i] = self._shards.row(int(places[i]), name)[select]
            rows[name] = from_bits(out, self.fields[name])
        return rows

    def verify(self) -> list[str]:
        """What is wrong with the files: a line for each whose bytes are not those written. Reads them all once."""
        checks = [
            (INDEX, self._contents.index),
            *((shard.file, shard.sha256) for shard in self._contents.shards),
        ]
        found = (digest_problem(self.folder / file, digest) for file, digest in checks)
        return [problem for problem in found if problem]

    def _places(self, keys: Ints) -> Ints:
        places = self._index.find(keys)
        missing = np.flatnonzero(places == ABSENT)
        if missing.size:
            rule = (
                f"{missing.size} of {len(keys)} samples have no row, the first has the key {keys[missing[0]]}: a run "
                "reads the samples over which the teacher was run, so data, seed and steps must be those of the cache"
            )
            raise DataError(f"{self.folder}: {rule}")
        return places


def _selection(name: str, field: Field, part: Slice | None) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Numpy's index into a row, and the shape of what it selects."""
    if part is None:
        return (), field.shape
    dim, which = part
    if not 0 <= dim < len(field.shape):
        raise ValueError(f"slices: {name} = {field} has no dim {dim}; dims are counted without the samples'")
    size = field.shape[dim]
    if isinstance(which, slice):
        count = len(range(*which.indices(size)))
        index: Any = which
    else:
        index = which.detach().cpu().numpy()
        if which.dtype != torch.int64 or which.ndim != 1 or not ((index >= 0) & (index < size)).all():
            rule = f"indices are int64 [m] of 0 to {size - 1}"
            raise ValueError(
                f"slices: {name} = {field}, dim {dim}: {rule}, not {which.dtype} {index.tolist()}"
            )
        count = len(index)
    return (*[slice(None)] * dim, index), (*field.shape[:dim], count, *field.shape[dim + 1 :])
