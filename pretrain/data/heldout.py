"""Held-out rows: every token of a store is a label exactly once.

Shapes: `n` rows, `S` tokens in a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike

from headway.pretrain.data.samples import Ints, Rows
from headway.pretrain.data.token_rows import Store, document_ids, outside_error
from headway.pretrain.errors import DataError, JobError


class HeldoutRows:
    """Sequential evaluation rows of one store, by number.

    A separator is put in front of the stream, so that the very first token is predicted too. With an overlap,
    every row but the first begins with `context` = floor(overlap S) tokens that an earlier row scored: they
    are read but not scored again, so that no token is predicted from less than that context (but at the
    beginning of the store). The last row is filled up with separators that are not scored and belong to a
    document of their own.

    Args:
        store: the tokens.
        seq_len: S.
        separator: token that ends each document.
        overlap: share of a row that is context only, 0 to below 1.
        vocab: tokens must be below it; None leaves them unchecked.
        name: of the store, in errors.

    Raises:
        JobError: overlap outside [0, 1).
        DataError: an empty store.
    """

    def __init__(
        self,
        store: Store,
        seq_len: int,
        separator: int,
        overlap: float = 0.0,
        vocab: int | None = None,
        name: str = "held-out store",
    ) -> None:
        if not 0 <= overlap < 1:
            raise JobError("overlap", overlap, "must be at least 0 and below 1", 0.5)
        if store.tokens < 1:
            raise DataError(f"{name}: holds no tokens; hold out more documents or give more text")
        self.store, self.seq_len, self.separator = store, seq_len, separator
        self.vocab, self.name = vocab, name
        self.context = int(overlap * seq_len)
        self.stride = seq_len - self.context
        self.identity: dict[str, int | str] = {"tokens": store.tokens, "seq_len": seq_len}

    def __len__(self) -> int:
        """Number of rows."""
        return 1 + max(0, -(-(self.store.tokens - self.seq_len) // self.stride))

    def rows(self, indices: ArrayLike, keys: Ints | None = None) -> Rows:
        """Rows of these numbers; `keys` are not used.

        Returns:
            `tokens` int64 [n, S + 1]: inputs are [:, :-1] and labels [:, 1:].
            `documents` int32 [n, S + 1]: index of the token's document within the row.
            `scored` bool [n, S]: whether the label counts.

        Raises:
            DataError: a token outside the vocabulary; names store and offset.
        """
        indices = np.asarray(indices, dtype=np.int64)
        tokens = np.full((indices.size, self.seq_len + 1), self.separator, dtype=np.int64)
        documents = np.zeros(tokens.shape, dtype=np.int32)
        scored = np.zeros((indices.size, self.seq_len), dtype=bool)
        for i, index in enumerate(indices.tolist()):
            front = int(index == 0)  # the separator that stands before the stream
            start = index * self.stride - 1 + front
            count = min(self.seq_len + 1 - front, self.store.tokens - start)
            real = self.store.read(start, count).astype(np.int64)
            if error := outside_error(self.name, start, real, self.vocab):
                raise error
            end = front + count
            tokens[i, front:end] = real
            documents[i, front:end] = document_ids(self.store, start, real, self.separator)
            documents[i, front:end] += front and real[0] == self.separator  # the first document is empty
            documents[i, end:] = documents[i, end - 1] + 1
            scored[i, 0 if front else self.context : end - 1] = True
        return {"tokens": tokens, "documents": documents, "scored": scored}


def heldout_rows(
    store: Store,
    seq_len: int,
    separator: int,
    overlap: float = 0.0,
    *,
    batch: int = 1,
    vocab: int | None = None,
    name: str = "held-out store",
) -> Iterator[Rows]:
    """All rows of `HeldoutRows` in order, `batch` at a time (the last batch may be smaller)."""
    rows = HeldoutRows(store, seq_len, separator, overlap, vocab, name)
    for first in range(0, len(rows), batch):
        yield rows.rows(np.arange(first, min(first + batch, len(rows))))
