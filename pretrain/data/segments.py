"""Pairs of segments for BERT: next-sentence (Devlin et al. 2019) and sentence-order (Lan et al. 2020) prediction.

A document of a token store is cut into chunks, as few as fit a row and as equal as can be, so that all of its
tokens are in exactly one chunk. A sample is a chunk, which a random cut splits into segments A and B:

    [CLS] A [SEP] B [SEP]   label 0: B follows A in the document
                            label 1, for half of the samples: B is from another document (`next`; its own B
                            is not shown this time), or A and B have changed places (`order`)

Shapes: `n` samples, `S` tokens in a row.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from headway.kernels.random import philox
from headway.pretrain.data.samples import Ints, Rows
from headway.pretrain.data.token_rows import outside_error
from headway.pretrain.data.tokenizer import Tokenizer
from headway.pretrain.errors import DataError, JobError

Kind = Literal["none", "next", "order"]

_STREAM = 0x70616972
"""Word of the Philox counter that keeps these draws apart from others of the same key ("pair")."""
_SPECIALS = {"none": 2, "next": 3, "order": 3}
_SHORTEST = {"none": 1, "next": 2, "order": 2}
"""Tokens of a chunk: two segments have one each at least."""


class Documents(Protocol):
    """What is asked of a token store."""

    tokens: int
    documents: int

    def text(self, i: int, separator: int) -> NDArray[Any]:
        """Tokens of document i without the separator that ends it."""

    def text_lengths(self, separator: int) -> Ints:
        """Sizes of all `text`s: int64 [documents]."""


class SegmentPairs:
    """The chunks of a store's documents as BERT's rows; a `Samples`.

    Under `next`, the other document's part is as long as the B that it replaces, and begins at a cut within a
    random chunk, not at the beginning of a document, as far as that document is long enough: neither length nor
    beginning tells the label.

    Args:
        store: documents; the separator that ends one is not part of its text.
        seq_len: S.
        kind: what label 1 means; `none` has rows [CLS] chunk [SEP] and no label.
        separator: token that ends each document of the store.
        cls, sep, pad: tokens of the row.
        name: of the source, in errors.
        vocab: tokens must be below it; None leaves them unchecked.
        breaks: bool [vocab], tokens after which a chunk may be cut (see `line_ends`); a chunk without one, and
            every chunk if not given, is cut anywhere, all places equally likely.

    Attributes:
        left_out: documents of a single token, which have no two segments.

    Raises:
        JobError: rows too short for two segments.
        DataError: a store without a document to cut; under `next`, without a second one.
    """

    def __init__(
        self,
        store: Documents,
        seq_len: int,
        kind: Kind,
        separator: int,
        cls: int,
        sep: int,
        pad: int,
        name: str,
        vocab: int | None = None,
        breaks: NDArray[np.bool_] | None = None,
    ) -> None:
        if seq_len < 6:  # chunks of at most 3 tokens: equal parts then never have fewer than 2
            rule = "a row of segments has [CLS], [SEP] and room for chunks of two to three tokens"
            raise JobError("data.seq_len", seq_len, rule, 6)
        self.store, self.seq_len, self.kind, self.separator = store, seq_len, kind, separator
        self.cls, self.sep, self.pad = cls, sep, pad
        self.name, self.vocab, self.breaks = name, vocab, breaks
        lengths = store.text_lengths(separator)
        usable = lengths >= _SHORTEST[kind]
        self.left_out = int(((lengths > 0) & ~usable).sum())
        if usable.sum() < (2 if kind == "next" else 1):
            raise self._too_few(int(usable.sum()))
        chunks = np.where(usable, -(-lengths // (seq_len - _SPECIALS[kind])), 0)
        self._firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(chunks, dtype=np.int64)])
        self.identity: dict[str, int | str] = {
            "tokens": store.tokens,
            "documents": store.documents,
            "seq_len": seq_len,
            "pairs": kind,
        }

    def __len__(self) -> int:
        """Number of chunks."""
        return int(self._firsts[-1])

    def rows(self, indices: Ints, keys: Ints) -> Rows:
        """Chunks of these numbers.

        Args:
            indices: int64 [n], each in [0, len).
            keys: int64 [n]: where a chunk is cut, its label and its other document are a function of it.

        Returns:
            `tokens` int64 [n, S], filled up with `pad`.
            `segments` int64 [n, S]: 1 for B and its [SEP], else 0.
            `documents` int32 [n, S]: 0, and -1 for padding.
            `maskable` bool [n, S]: neither special nor padding.
            `label` int64 [n]: see the top of this file; not under `none`.

        Raises:
            DataError: a token outside the vocabulary; names source, document and offset in it.
        """
        shape = (indices.size, self.seq_len)
        rows: Rows = {
            "tokens": np.full(shape, self.pad, np.int64),
            "segments": np.zeros(shape, np.int64),
            "documents": np.full(shape, -1, np.int32),
            "maskable": np.zeros(shape, bool),
        }
        words = np.stack(philox(keys, 0, 0, 0, _STREAM), -1)
        labels = np.zeros(indices.size, np.int64)
        for i, (index, row_words) in enumerate(zip(indices.tolist(), words.tolist(), strict=True)):
            a, b, labels[i] = self._pair(index, row_words)
            middle = a.size + 2
            end = middle + (0 if self.kind == "none" else b.size + 1)
            rows["tokens"][i, :end] = self.sep
            rows["tokens"][i, 0] = self.cls
            for start, part in ((1, a), (middle, b)):
                rows["tokens"][i, start : start + part.size] = part
                rows["maskable"][i, start : start + part.size] = True
            rows["segments"][i, middle:end] = 1
            rows["documents"][i, :end] = 0
        return rows if self.kind == "none" else rows | {"label": labels}

    def _pair(self, index: int, words: list[int]) -> tuple[Ints, Ints, int]:
        """Segments A and B of a chunk, and the label."""
        document, start, stop, _ = self._locate(index)
        chunk = self._read(document, start, stop)
        if self.kind == "none":
            return chunk, chunk[:0], 0
        coin, place, other, other_place = words
        cut = self._cut(chunk, chunk.size - 1, place)
        a, b, label = chunk[:cut], chunk[cut:], coin >> 31
        if label and self.kind == "order":
            a, b = b, a
        elif label:
            b = self._foreign(document, b.size, other, other_place)
        return a, b, label

    def _foreign(self, document: int, size: int, word: int, place: int) -> Ints:
        """At most `size` tokens of a document other than this one."""
        first, after = map(int, self._firsts[document : document + 2])
        number = _below(word, len(self) - (after - first))
        number += (after - first) * (number >= first)
        document, start, stop, length = self._locate(number)
        last = min(max(length - size - start, 1), stop - start - 1)  # a later cut would leave too few tokens
        start += self._cut(self._read(document, start, stop), last, place)
        return self._read(document, start, start + size)

    def _locate(self, index: int) -> tuple[int, int, int, int]:
        """Document of a chunk, the chunk's first token in it and the one after its last, and all its tokens."""
        document = int(np.searchsorted(self._firsts, index, side="right")) - 1
        first, after = map(int, self._firsts[document : document + 2])
        length = self.store.text(document, self.separator).size
        start, stop = ((index - first + i) * length // (after - first) for i in (0, 1))
        return document, start, stop, length

    def _read(self, document: int, start: int, stop: int) -> Ints:
        """Tokens [start, stop) of a document, or as many as there are."""
        tokens = self.store.text(document, self.separator)[start:stop].astype(np.int64)
        if error := outside_error(f"{self.name}, document {document}", start, tokens, self.vocab):
            raise error
        return tokens

    def _cut(self, tokens: Ints, last: int, word: int) -> int:
        """A place in [1, last] after a break, or anywhere in there if there is none."""
        places = np.arange(1, last + 1)
        if self.breaks is not None and (after := self.breaks[tokens[:last]]).any():
            places = places[after]
        return int(places[_below(word, places.size)])

    def _too_few(self, usable: int) -> DataError:
        found = f"{self.name}: holds {usable} documents of {_SHORTEST[self.kind]} tokens or more"
        if usable:
            rule = "with objective.masking.pairs = next the second segment is taken from another document"
            return DataError(
                f"{found}, and {rule}; give more documents, or set objective.masking.pairs=order"
            )
        return DataError(f"{found}; give more text")


def line_ends(tokenizer: Tokenizer) -> NDArray[np.bool_]:
    """Whether a token ends a line: bool [vocab]. All false for a tokenizer that drops newlines."""
    return np.array([tokenizer.decode([i]).endswith("\n") for i in range(tokenizer.vocab)])


def _below(word: int, count: int) -> int:
    """A number in [0, count) from 32 random bits; chances differ by 2^-32 at most."""
    return word * count >> 32
