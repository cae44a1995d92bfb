"""The proof that a run used every sample exactly once an epoch, from its ledger.

What steps should have used is computed anew from the orders that the ledger holds, and compared with what the ranks
found in their batches. Orders must go on where the one before ended, source by source; and every sample that was used
is ticked off, so that an epoch is known to be whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from headway.pretrain import config
from headway.pretrain.data.ledger_faults import Change, explain
from headway.pretrain.data.order import Blend
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.samples import Ints, Rows, make_keys
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.used import Used
from headway.pretrain.errors import LedgerError

BLOCK = 1 << 16
"""Draws that are computed at once."""
Identity = dict[str, int | str]


@dataclass
class Counted:
    """A source of which only size and identity are known; see `headway.pretrain.data.samples.Samples`."""

    size: int
    identity: Identity

    def __len__(self) -> int:
        return self.size

    def rows(self, indices: Ints, keys: Ints) -> Rows:
        raise NotImplementedError("nothing is read here")


@dataclass
class SourceUse:
    """How much of a source was used: `used` samples of `size`, so used // size whole epochs."""

    name: str
    size: int
    identity: Identity
    used: int = 0


@dataclass
class Proof:
    """What the ledger shows.

    Attributes:
        starts: steps (from 1) with which the run began and went on.
        ends: draws used after each step.
    """

    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    sources: dict[str, SourceUse] = field(default_factory=dict)


def check(rows: Iterable[Mapping[str, Any]], data: Mapping[str, Counted] | None = None) -> Proof:
    """Prove that every sample was used exactly once an epoch.

    Args:
        rows: of the ledger, in order.
        data: sources as they are now, by name; None leaves them unchecked.

    Raises:
        LedgerError: it was not, or the ledger does not show it; names the first step that differs and its samples.
    """
    checker = Checker(data)
    for block in checker.blocks(rows):
        checker.compare(block)
    return checker.proof


def _used(row: Mapping[str, Any]) -> Used | None:
    try:
        return Used(int(row["rows"]), int(row["draws"]), int(row["digest"], 16))
    except (KeyError, TypeError, ValueError):
        return None


class Checker:
    """Goes through a ledger; `proof` is what was shown so far."""

    def __init__(self, data: Mapping[str, Counted] | None) -> None:
        self.data, self.proof = data, Proof()
        self.orders: list[tuple[int, SampleStream]] = []  # draw from which each applies
        self.sizes = BatchSizes(config.Train())
        self.ticks: dict[tuple[str, int], NDArray[np.bool_]] = {}

    # -- reading -------------------------------------------------------------------------------------------

    def blocks(self, rows: Iterable[Mapping[str, Any]]) -> Iterator[list[tuple[int, int, Used]]]:
        """(first draw, rows, what was used) of steps that lie in one order, some BLOCK draws at a time."""
        block: list[tuple[int, int, Used]] = []
        draw = 0
        for row in rows:
            step, used = len(self.proof.ends) + len(block) + 1, _used(row)
            wrong = row.get("step") != step or used is None
            if wrong or "order" in row or (block and draw - block[0][0] >= BLOCK):
                yield block
                block = []
            if row.get("step") != step:
                self._fail(step, f"has no record: the ledger goes on with step {row.get('step')}")
            if used is None:
                self._fail(step, f"has a damaged record: {dict(row)}")
            if "order" in row:
                self._take_order(step, row["order"], draw)
            if not self.orders:
                self._fail(step, "has no order: its record does not say where the run began")
            count = self.sizes.rows(self.sizes.step_of(draw))
            block.append((draw, count, used))
            draw += count
        yield block

    def _take_order(self, step: int, order: Mapping[str, Any], draw: int) -> None:
        """Go on with another order; it must begin where the last one ended."""
        try:
            active = [s for s in order["sources"] if s["weight"] > 0]
            parked = {s["name"]: s["consumed"] for s in order["sources"] if not s["weight"] > 0}
            known = {s["name"]: Counted(s["size"], s["identity"]) for s in active}
            stream = SampleStream([(s["name"], known[s["name"]], s["weight"]) for s in active], order["seed"])
            weights, consumed = [s["weight"] for s in active], [s["consumed"] for s in active]
            stream.blend = Blend(weights, order["start"], consumed)
            here = dict(zip(stream.names, stream.blend.counts(order["draw"]), strict=True))
            train = config.Train(global_batch=order["global_batch"], ramp=order["ramp"])
        except (KeyError, TypeError, ValueError) as fault:
            self._fail(step, f"has a damaged order: {fault!r}")
        self._check_cursor(step, order, draw)
        for name, samples in known.items():
            self._check_source(step, name, samples)
        self._check_uses(step, here | parked)
        self.orders.append((draw, stream))
        self.sizes = BatchSizes(train)
        self.proof.starts.append(step)

    # -- orders --------------------------------------------------------------------------------------------

    def _check_cursor(self, step: int, order: Mapping[str, Any], draw: int) -> None:
        begin = order["draw"]
        if self.orders and order["seed"] != self.orders[-1][1].seed:
            self._fail(
                step, f"goes on with seed {order['seed']}, but the run began with {self.orders[-1][1].seed}"
            )
        if begin > draw:
            self._fail(step, f"goes on at draw {begin}: draws {draw} to {begin - 1} were never used")
        if begin < draw:
            self._fail(step, f"goes on at draw {begin}: draws {begin} to {draw - 1} are used a second time")

    def _check_source(self, step: int, name: str, samples: Counted) -> None:
        known = self.proof.sources.setdefault(name, SourceUse(name, samples.size, samples.identity))
        others = [("when the run began with it", Counted(known.size, known.identity))]
        if self.data is not None and name in self.data:
            others.append(("in the data of today", self.data[name]))
        for when, other in others:
            if (other.size, other.identity) != (samples.size, samples.identity):
                here, there = (f"{s.size} samples {s.identity}" for s in (samples, other))
                self._fail(step, f"read {name} with {here}, but {when} it had {there}")

    def _check_uses(self, step: int, counts: Mapping[str, int]) -> None:
        """Every source goes on where it was."""
        for name, source in self.proof.sources.items():
            count = counts.get(name, 0)
            if count != source.used:
                least, most = sorted((count, source.used))
                what = "never used" if count > source.used else "used again"
                rule = f"its samples {least} to {most - 1} in the order of epoch {least // source.size} are {what}"
                self._fail(
                    step, f"goes on at sample {count} of {name}, of which {source.used} were used: {rule}"
                )

    # -- steps ---------------------------------------------------------------------------------------------

    def compare(self, block: Sequence[tuple[int, int, Used]]) -> None:
        """Compare steps with what they should have used, and tick their samples off."""
        if not block:
            return
        first, stop = block[0][0], block[-1][0] + block[-1][1]
        draws = np.arange(first, stop)
        source, number, epoch = self.orders[-1][1].locate(draws)
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(self.keys(draws).astype(np.uint64))])
        for draw, count, found in block:
            digest = int(sums[draw + count - first]) - int(sums[draw - first])
            expected = Used(count, count * (2 * draw + count - 1) // 2, digest % (1 << 64))
            if found != expected:
                raise LedgerError(self._explain(draw, expected, found))
            self.proof.ends.append(draw + count)
        self._tick(source, number, epoch)

    def _tick(self, source: Ints, number: Ints, epoch: Ints) -> None:
        names, step = self.orders[-1][1].names, len(self.proof.ends)
        for s, e in np.unique(np.stack([source, epoch]), axis=1).T.tolist():
            use = self.proof.sources[names[s]]
            mine = number[(source == s) & (epoch == e)]
            ticks = self.ticks.setdefault((use.name, e), np.zeros(use.size, dtype=bool))
            values, times = np.unique(mine, return_counts=True)
            twice = values[ticks[values] | (times > 1)]
            if twice.size:
                self._fail(
                    step, f"or one shortly before it used {use.name} row {twice[0]} twice in epoch {e}"
                )
            ticks[values] = True
            use.used += mine.size
            if use.used >= (e + 1) * use.size:
                if not ticks.all():
                    lost = int(np.flatnonzero(~ticks)[0])
                    self._fail(step, f"ends epoch {e} of {use.name} without its row {lost}")
                del self.ticks[use.name, e]

    def keys(self, draws: Ints) -> Ints:
        """Keys of samples that any of the orders so far drew, or the last one will."""
        keys = np.empty(draws.size, dtype=np.int64)
        which = np.searchsorted([begin for begin, _ in self.orders], draws, side="right") - 1
        for order in np.unique(which).tolist():
            stream, mine = self.orders[order][1], np.flatnonzero(which == order)
            source, number, epoch = stream.locate(draws[mine])
            for s in np.unique(source).tolist():
                there = source == s
                numbers, epochs = number[there].tolist(), epoch[there].tolist()
                keys[mine[there]] = make_keys(stream.names[s], stream.seed, numbers, epochs)
        return keys

    # -- what to say ---------------------------------------------------------------------------------------

    def _explain(self, draw: int, expected: Used, found: Used) -> str:
        step = len(self.proof.ends) + 1
        change = explain(draw, expected, found, self.keys)
        who = f"step {step} did not use the samples of its turn"
        if change is None:
            where = self._named(range(draw, draw + expected.rows))
            return f"{who} ({where}): {found.rows} others were used, or its record was changed"
        return f"{who}: {'; '.join(self._sentences(change, draw + expected.rows))}"

    def _sentences(self, change: Change, stop: int) -> Iterator[str]:
        if change.lost:
            yield f"lost were {self._named(change.lost)}"
        if change.gained:
            first, done = change.gained[0], len(self.proof.ends)
            step = bisect_right(self.proof.ends, first) + 1
            whose = f"which step {step} had used" if step <= done else "which it used twice"
            whose = "whose turn comes later" if first >= stop else whose
            yield f"used beyond its turn were {self._named(change.gained)}, {whose}"

    def _named(self, draws: range) -> str:
        """Names of samples, the first few of them."""
        begins = [begin for begin, _ in self.orders]
        names = [self.orders[bisect_right(begins, d) - 1][1].describe(d) for d in draws[:8]]
        more = f" and {len(draws) - 8} more" if len(draws) > 8 else ""
        return f"draws {draws[0]} to {draws[-1]}: {', '.join(names)}{more}"

    def _fail(self, step: int, what: str) -> NoReturn:
        raise LedgerError(f"step {step} {what}")
