"""The shard that a writer is filling, in memory."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from headway.pretrain.data.teacher_cache.fields import KEY, KEY_FIELD, Bits, Fields, Ints


class Buffer:
    """Rows that are not on disk yet.

    Args:
        fields: what a row holds.
        size: rows that it can hold.
    """

    def __init__(self, fields: Fields, size: int) -> None:
        every = {KEY: KEY_FIELD, **fields}
        self._arrays = {name: np.empty((size, *field.shape), field.bits) for name, field in every.items()}
        self._size, self._filled = size, 0

    def __len__(self) -> int:
        return self._filled

    @property
    def full(self) -> bool:
        return self._filled == self._size

    def has(self, keys: Ints) -> np.ndarray:
        """Which of these keys have a row here: bool [n]."""
        return np.isin(keys, self.arrays()[KEY])

    def differing(self, key: int, row: Mapping[str, Bits]) -> str | None:
        """Name of the first field in which this key's row, which is here, has other bits than `row`."""
        at = int(np.flatnonzero(self.arrays()[KEY] == key)[0])
        return next((name for name in row if not np.array_equal(self._arrays[name][at], row[name])), None)

    def put(self, key: int, row: Mapping[str, Bits]) -> None:
        """Append a row."""
        self._arrays[KEY][self._filled] = key
        for name, bits in row.items():
            self._arrays[name][self._filled] = bits
        self._filled += 1

    def arrays(self) -> dict[str, Bits]:
        """The rows: name of every field, and `key`, -> [rows, *shape]. A view: `clear` lets them be overwritten."""
        return {name: array[: self._filled] for name, array in self._arrays.items()}

    def clear(self) -> None:
        self._filled = 0
