"""What a source of samples is, whatever it holds: rows of text, pairs of sentences, images.

Shapes: `n` samples.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Rows = dict[str, NDArray[Any]]
"""Arrays whose first dim is the sample."""


class Samples(Protocol):
    """Samples by number. Stateless: they may be asked for in any order, from any thread.

    Attributes:
        identity: what the number of a sample means depends on (sizes, lengths of rows), as JSON values. A run goes
            on only with sources whose identities are the saved ones.
    """

    identity: dict[str, int | str]

    def __len__(self) -> int:
        """How many there are."""

    def rows(self, indices: Ints, keys: Ints) -> Rows:
        """Samples of these numbers.

        Args:
            indices: int64 [n], each in [0, len).
            keys: int64 [n], one for each (seed, source, sample, epoch): all randomness is a function of it.

        Raises:
            DataError: a sample cannot be read; names it.
        """


def make_keys(name: str, seed: int, indices: Sequence[int], epochs: Sequence[int]) -> Ints:
    """Keys of samples: int64 [n], a hash of (source, seed, number, epoch) each."""
    pairs = zip(indices, epochs, strict=True)
    digests = (hashlib.blake2b(repr((name, seed, i, e)).encode(), digest_size=8).digest() for i, e in pairs)
    return np.frombuffer(b"".join(digests), dtype="<i8").astype(np.int64)
