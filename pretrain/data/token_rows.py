"""Rows of tokens, cut from one flat stream.

With S = `seq_len`, row r of a store is tokens [r S, r S + S], S + 1 of them: S inputs and, shifted by one, S labels.
Neighbouring rows share a token, so every token but the first is a label exactly once an epoch. The last
(tokens - 1) mod S tokens fill no row and are not trained on.

Shapes: `n` samples, `S` tokens in a row.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headway.pretrain.data.samples import Ints, Rows
from headway.pretrain.errors import DataError


class Store(Protocol):
    """What is asked of a token store."""

    tokens: int

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Tokens [start, start + count) of the flat stream."""

    def boundaries(self, start: int, stop: int) -> Ints:
        """Offsets in [start, stop) where documents begin, ascending."""


class TokenRows:
    """Samples that are rows of a store.

    Args:
        store: the tokens.
        seq_len: S.
        separator: token that ends each document.
        vocab: tokens must be below it; None leaves them unchecked.
        name: of the store, in errors.

    Raises:
        DataError: the store has not one full row.
    """

    def __init__(
        self, store: Store, seq_len: int, separator: int, vocab: int | None = None, name: str = "store"
    ) -> None:
        self.store, self.seq_len, self.separator = store, seq_len, separator
        self.vocab, self.name = vocab, name
        self._rows = count_rows(name, store, seq_len)
        self.identity: dict[str, int | str] = {"tokens": store.tokens, "seq_len": seq_len}

    def __len__(self) -> int:
        return self._rows

    def rows(self, indices: ArrayLike, keys: Ints | None = None) -> Rows:
        """Rows of these numbers; `keys` are not used.

        Returns:
            `tokens` int64 [n, S + 1]: inputs are [:, :-1] and labels [:, 1:].
            `documents` int32 [n, S + 1]: index of the token's document within the row; see `document_ids`.

        Raises:
            DataError: a token outside the vocabulary; names store and offset.
        """
        indices = np.asarray(indices, dtype=np.int64)
        tokens = np.empty((indices.size, self.seq_len + 1), dtype=np.int64)
        documents = np.empty(tokens.shape, dtype=np.int32)
        for i, start in enumerate((indices * self.seq_len).tolist()):
            tokens[i] = self.store.read(start, self.seq_len + 1)
            if error := outside_error(self.name, start, tokens[i], self.vocab):
                raise error
            documents[i] = document_ids(self.store, start, tokens[i], self.separator)
        return {"tokens": tokens, "documents": documents}


def count_rows(name: str, store: Store, seq_len: int) -> int:
    """Full training rows of a store; DataError if there is none."""
    rows = (store.tokens - 1) // seq_len
    if rows < 1:
        raise DataError(
            f"{name}: holds {store.tokens} tokens, but one row of data.seq_len = {seq_len} needs "
            f"{seq_len + 1}; give more text or shorter rows"
        )
    return rows


def document_ids(store: Store, start: int, tokens: Ints, separator: int) -> NDArray[np.int32]:
    """Index of each token's document within a row: int32 [L], from 0, for the stream's tokens from `start`.

    The separator that ends a document is counted as the first token of the next one: it acts as the next
    one's beginning-of-document token, so that with isolated documents every token is still predicted.
    Documents that end without a separator begin at their own first token.
    """
    stop = start + tokens.size
    begins = store.boundaries(start + 1, min(stop + 1, store.tokens)) - start
    if stop == store.tokens:
        begins = np.append(begins, tokens.size)  # what would follow the last document
    begins = begins - (tokens[begins - 1] == separator)
    marks = np.zeros(tokens.size, dtype=np.int32)
    marks[begins[(begins > 0) & (begins < tokens.size)]] = 1
    return np.cumsum(marks, dtype=np.int32)


def outside_error(name: str, start: int, tokens: Ints, vocab: int | None) -> DataError | None:
    """Error that names the first token which the vocabulary does not have, if there is one."""
    if vocab is None or not tokens.size or (tokens.min() >= 0 and tokens.max() < vocab):
        return None
    place = int(np.flatnonzero((tokens < 0) | (tokens >= vocab))[0])
    return DataError(
        f"{name}: token {tokens[place]} at offset {start + place} is not in the vocabulary of {vocab}; the "
        "store was built with another tokenizer: build it again, or give that tokenizer"
    )
