"""Rows of tokens in their global order: what a run reads, and where it is in it.

A store is one flat stream of tokens. With S = `seq_len`, row r of a store is tokens [r S, r S + S], S + 1 of
them: S inputs and, shifted by one, S labels. Neighbouring rows share a token, so every token but the first is
a label exactly once an epoch. The last (tokens - 1) mod S tokens fill no row and are not trained on.

Shapes: `n` samples, `S` tokens in a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from headway.pretrain.data.order import Blend, Ints, Permutation, make_key
from headway.pretrain.errors import DataError

Rows = dict[str, NDArray[Any]]


class Store(Protocol):
    """What is asked of a token store."""

    tokens: int

    def read(self, start: int, count: int) -> NDArray[Any]:
        """Tokens [start, start + count) of the flat stream."""

    def boundaries(self, start: int, stop: int) -> Ints:
        """Offsets in [start, stop) where documents begin, ascending."""


class SampleStream:
    """Draw i -> row: a blend of sources, each shuffled anew every epoch, and a cursor.

    The order is a function of the seed and the sources' names, sizes and weights. `draw` is the cursor: the
    next draw of the run. The rest is stateless, so rows may be asked for in any order, from any thread.

    Args:
        sources: (name, store, weight) each; the name is the source's identity, the weight its share.
        seq_len: S.
        seed: of the run.
        separator: token that ends each document of the stores.
        vocab: tokens must be below it; None leaves them unchecked.

    Raises:
        DataError: no source, two of one name, a weight that is not positive, a store without one full row.
    """

    def __init__(
        self,
        sources: Sequence[tuple[str, Store, float]],
        seq_len: int,
        seed: int,
        separator: int,
        vocab: int | None = None,
    ) -> None:
        self.names = [name for name, _, _ in sources]
        self.stores = [store for _, store, _ in sources]
        self.seq_len, self.seed, self.separator, self.vocab = seq_len, seed, separator, vocab
        if len(set(self.names)) < len(self.names):
            raise DataError(
                f"data.sources: two sources have one name: {', '.join(self.names)}; name each once"
            )
        self.row_counts = [count_rows(name, store, seq_len) for name, store, _ in sources]
        try:
            self.blend = Blend([weight for _, _, weight in sources])
        except ValueError as error:
            raise DataError(f"data.sources: {error}") from None
        self.draw = 0
        self._retired: list[dict[str, Any]] = []
        self._permutation = lru_cache(maxsize=64)(self._make_permutation)

    def locate(self, draws: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """Source, row and epoch of each draw: three int64 arrays of draws' shape [n]."""
        source, index = self.blend.place(draws)
        row_counts = np.array(self.row_counts, dtype=np.int64)[source]
        epoch, place = index // row_counts, index % row_counts
        row = np.empty_like(place)
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            mine = (source == s) & (epoch == e)
            row[mine] = self._permutation(s, e)(place[mine])
        return source, row, epoch

    def rows(self, draws: ArrayLike) -> Rows:
        """Rows of these draws.

        Returns:
            `tokens` int64 [n, S + 1]: inputs are [:, :-1] and labels [:, 1:].
            `documents` int32 [n, S + 1]: index of the token's document within the row; see `document_ids`.
            `sample` int64 [n]: the draws.

        Raises:
            DataError: a token outside the vocabulary; names store and offset.
        """
        draws = np.asarray(draws, dtype=np.int64)
        source, row, _ = self.locate(draws)
        tokens = np.empty((draws.size, self.seq_len + 1), dtype=np.int64)
        documents = np.empty(tokens.shape, dtype=np.int32)
        for i, (s, start) in enumerate(zip(source.tolist(), (row * self.seq_len).tolist(), strict=True)):
            tokens[i] = self.stores[s].read(start, self.seq_len + 1)
            if error := outside_error(self.names[s], start, tokens[i], self.vocab):
                raise error
            documents[i] = document_ids(self.stores[s], start, tokens[i], self.separator)
        return {"tokens": tokens, "documents": documents, "sample": draws}

    def batch(self, first: int, global_batch: int, rank: int = 0, ranks: int = 1) -> Rows:
        """One rank's rows of the global batch that draws [first, first + global_batch) form.

        Returns: `rows` of them and `slot`, int64 [n], their places in the global batch.
        """
        slot = np.array(rank_slots(global_batch, rank, ranks), dtype=np.int64)
        return {**self.rows(first + slot), "slot": slot}

    def describe(self, draw: int) -> str:
        """Where a draw comes from, for people: "corpus.jsonl row 1234 (epoch 0)"."""
        source, row, epoch = (int(x[0]) for x in self.locate([draw]))
        return f"{self.names[source]} row {row} (epoch {epoch})"

    def state(self) -> dict[str, Any]:
        """The cursor, as JSON values: the next draw, and where the blend's weights began."""
        known = zip(self.names, self.stores, self.blend.weights, self.blend.consumed, strict=True)
        return {
            "draw": self.draw,
            "seed": self.seed,
            "seq_len": self.seq_len,
            "start": self.blend.start,
            "sources": [{"name": n, "tokens": s.tokens, "weight": w, "consumed": c} for n, s, w, c in known]
            + self._retired,
        }

    def load(self, state: dict[str, Any]) -> list[str]:
        """Go on from a saved cursor, exactly; other weights, and sources that came or went, apply from here.

        Every source goes on where it was, so that a changed blend neither loses nor repeats a sample; one
        that went keeps its place for the day it comes back.

        Returns: what differs, a sentence each; empty if nothing does.

        Raises:
            DataError: the seed, the row length or a corpus is another, so the saved place means nothing here.
        """
        self._check_same(state)
        active = [s for s in state["sources"] if s["weight"] > 0]
        saved = Blend([s["weight"] for s in active], state["start"], [s["consumed"] for s in active])
        taken = {s["name"]: s["consumed"] for s in state["sources"]}
        taken |= zip((s["name"] for s in active), saved.counts(state["draw"]), strict=True)
        notes = self._differences(active)
        if notes:
            here = [taken.get(name, 0) for name in self.names]
            self.blend = Blend(self.blend.weights, state["draw"], here)
        else:
            self.blend = saved
        self._retired = [
            {**s, "weight": 0, "consumed": taken[s["name"]]}
            for s in state["sources"]
            if s["name"] not in self.names
        ]
        self.draw = state["draw"]
        return notes

    def _check_same(self, state: dict[str, Any]) -> None:
        """DataError if a saved cursor is of another order."""
        for field, label in (("seed", "train.seed"), ("seq_len", "data.seq_len")):
            if state[field] != getattr(self, field):
                raise DataError(
                    f"{label} = {getattr(self, field)}: the run was saved with {state[field]}, and its "
                    "place in the order of samples has no meaning here; set that again, or start a new run"
                )
        saved_tokens = {s["name"]: s["tokens"] for s in state["sources"]}
        for name, store in zip(self.names, self.stores, strict=True):
            if saved_tokens.get(name, store.tokens) != store.tokens:
                raise DataError(
                    f"{name}: holds {store.tokens} tokens, but {saved_tokens[name]} when the run was saved, "
                    "so its rows are others; restore that corpus, or add the new one under another name"
                )

    def _differences(self, active: list[dict[str, Any]]) -> list[str]:
        """What differs between the saved sources and these."""
        before = {s["name"]: s["weight"] for s in active}
        after = dict(zip(self.names, self.blend.weights, strict=True))
        notes = [f"{name}: gone from the blend" for name in before if name not in after]
        notes += [f"{name}: new in the blend" for name in after if name not in before]
        for name in before.keys() & after.keys():
            if before[name] != after[name]:
                notes.append(f"{name}: weight {before[name]:g} -> {after[name]:g}")
        if not notes and list(before) != list(after):
            notes.append(f"sources come in another order: {', '.join(after)}")
        return sorted(notes)

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.row_counts[source], make_key(self.seed, self.names[source], epoch))


def rank_slots(global_batch: int, rank: int, ranks: int) -> range:
    """Places of one rank's rows in the global batch: contiguous, and as equal as they can be."""
    return range(rank * global_batch // ranks, (rank + 1) * global_batch // ranks)


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
