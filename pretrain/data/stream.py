"""Samples in their global order: what a run reads, and where it is in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from headway.pretrain.data.order import Blend, Permutation, make_key
from headway.pretrain.data.samples import Ints, Rows, Samples, make_keys
from headway.pretrain.errors import DataError

SETTING = {"seq_len": "data.seq_len", "target_len": "data.target_len", "pairs": "objective.masking.pairs"}
"""Settings that make up an identity, for messages."""


class SampleStream:
    """Draw i -> sample: a blend of sources, each shuffled anew every epoch, and a cursor.

    The order is a function of the seed and the sources' names, sizes and weights. `draw` is the cursor: the
    next draw of the run. The rest is stateless, so rows may be asked for in any order, from any thread.

    Args:
        sources: (name, samples, weight) each; the name is the source's identity, the weight its share.
        seed: of the run.

    Raises:
        DataError: no source, two of one name, a weight that is not positive.
    """

    def __init__(self, sources: Sequence[tuple[str, Samples, float]], seed: int) -> None:
        self.names = [name for name, _, _ in sources]
        self.samples = [samples for _, samples, _ in sources]
        self.seed = seed
        if len(set(self.names)) < len(self.names):
            raise DataError(
                f"data.sources: two sources have one name: {', '.join(self.names)}; name each once"
            )
        self.counts = [len(samples) for samples in self.samples]
        try:
            self.blend = Blend([weight for _, _, weight in sources])
        except ValueError as error:
            raise DataError(f"data.sources: {error}") from None
        self.draw = 0
        self._retired: list[dict[str, Any]] = []
        self._permutation = lru_cache(maxsize=64)(self._make_permutation)

    def locate(self, draws: ArrayLike) -> tuple[Ints, Ints, Ints]:
        """Source, number and epoch of each draw's sample: three int64 arrays of draws' shape [n]."""
        source, index = self.blend.place(draws)
        counts = np.array(self.counts, dtype=np.int64)[source]
        epoch, place = index // counts, index % counts
        number = np.empty_like(place)
        for s, e in set(zip(source.tolist(), epoch.tolist(), strict=True)):
            mine = (source == s) & (epoch == e)
            number[mine] = self._permutation(s, e)(place[mine])
        return source, number, epoch

    def rows(self, draws: ArrayLike) -> Rows:
        """Samples of these draws.

        Returns: what the sources give, and
            `sample` int64 [n]: the draws.
            `key` int64 [n]: hashes of (source, seed, sample, epoch), which all corruption is a function of.

        Raises:
            DataError: a sample cannot be read; names it.
        """
        draws = np.asarray(draws, dtype=np.int64)
        source, number, epoch = self.locate(draws)
        keys = self._keys(source, number, epoch)
        parts: list[tuple[np.ndarray, Rows]] = []
        for s in np.unique(source).tolist():
            mine = np.flatnonzero(source == s)
            parts.append((mine, self.samples[s].rows(number[mine], keys[mine])))
        return {**_merged(parts, draws.size), "sample": draws, "key": keys}

    def keys(self, draws: ArrayLike) -> Ints:
        """`key` of these draws' samples, int64 [n]; no sample is read."""
        return self._keys(*self.locate(np.asarray(draws, dtype=np.int64)))

    def batch(self, first: int, global_batch: int, rank: int = 0, ranks: int = 1) -> Rows:
        """One rank's rows of the global batch that draws [first, first + global_batch) form.

        Returns: `rows` of them and `slot`, int64 [n], their places in the global batch.
        """
        slot = np.array(rank_slots(global_batch, rank, ranks), dtype=np.int64)
        return {**self.rows(first + slot), "slot": slot}

    def describe(self, draw: int) -> str:
        """Where a draw comes from, for people: "corpus.jsonl row 1234 (epoch 0)"."""
        source, number, epoch = (int(x[0]) for x in self.locate([draw]))
        return f"{self.names[source]} row {number} (epoch {epoch})"

    def state(self) -> dict[str, Any]:
        """The cursor, as JSON values: the next draw, and where the blend's weights began."""
        known = zip(self.names, self.samples, self.blend.weights, self.blend.consumed, strict=True)
        sources = [{"name": n, "identity": s.identity, "weight": w, "consumed": c} for n, s, w, c in known]
        return {
            "draw": self.draw,
            "seed": self.seed,
            "start": self.blend.start,
            "sources": sources + self._retired,
        }

    def load(self, state: dict[str, Any]) -> list[str]:
        """Go on from a saved cursor, exactly; other weights, and sources that came or went, apply from here.

        Every source goes on where it was, so that a changed blend neither loses nor repeats a sample; one
        that went keeps its place for the day it comes back.

        Returns: what differs, a sentence each; empty if nothing does.

        Raises:
            DataError: the seed, or what a source's samples are, is another, so the saved place means nothing here.
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
        if state["seed"] != self.seed:
            raise DataError(
                f"train.seed = {self.seed}: the run was saved with {state['seed']}, and its place in the order "
                "of samples has no meaning here; set that again, or start a new run"
            )
        before = {s["name"]: s["identity"] for s in state["sources"]}
        for name, samples in zip(self.names, self.samples, strict=True):
            for field, saved in before.get(name, {}).items():
                now = samples.identity.get(field)
                if now == saved:
                    continue
                if field in SETTING:
                    raise DataError(
                        f"{SETTING[field]} = {now}: the run was saved with {saved}, and its place in the order of "
                        "samples has no meaning here; set that again, or start a new run"
                    )
                raise DataError(
                    f"{name}: holds {now} {field}, but {saved} when the run was saved, so its samples are "
                    "others; restore that corpus, or add the new one under another name"
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

    def _keys(self, source: Ints, number: Ints, epoch: Ints) -> Ints:
        keys = np.empty(source.size, dtype=np.int64)
        for s in np.unique(source).tolist():
            mine = np.flatnonzero(source == s)
            keys[mine] = make_keys(self.names[s], self.seed, number[mine].tolist(), epoch[mine].tolist())
        return keys

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self.counts[source], make_key(self.seed, self.names[source], epoch))


def rank_slots(global_batch: int, rank: int, ranks: int) -> range:
    """Places of one rank's rows in the global batch: contiguous, and as equal as they can be."""
    return range(rank * global_batch // ranks, (rank + 1) * global_batch // ranks)


def _merged(parts: list[tuple[np.ndarray, Rows]], size: int) -> Rows:
    """Rows of several sources, each at its places."""
    if len(parts) == 1:
        return parts[0][1]
    merged = {}
    for field, example in parts[0][1].items():
        merged[field] = np.empty((size, *example.shape[1:]), dtype=example.dtype)
        for places, rows in parts:
            merged[field][places] = rows[field]
    return merged
