"""All that a run's records tell, put together for its model card and its data sheet; what they do not tell is None."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.pretrain.records.report import derive, flatten, know


@dataclass(frozen=True)
class Weights:
    """The checkpoint that a card speaks of.

    Attributes:
        step: optimizer steps behind it.
        parameters: weights of the model; shared ones once.
        dtypes: of those weights.
        created: UTC time of writing.
        imported: folder that the weights were imported from.
        measured: whether evaluations are of them; not, where these were of averages that are left out.
    """

    step: int
    parameters: int
    dtypes: list[str]
    created: str
    imported: str | None = None
    measured: bool = True


@dataclass(frozen=True)
class Story:
    """A run.

    Attributes:
        settings: (dotted name, value, origin) of the whole job.
        rows: of metrics.jsonl, up to the step of the weights.
        events: of events.jsonl.
        known: as in summary.json.
        weights: None where no checkpoint is left.
        proof: what the ledger shows, in words.
        used: (source, samples, used) by the ledger.
    """

    name: str
    settings: list[tuple[str, Any, str]]
    rows: list[dict[str, Any]]
    events: list[dict[str, Any]]
    known: dict[str, Any]
    weights: Weights | None
    proof: str
    used: list[tuple[str, int, int]] = field(default_factory=list)

    @property
    def values(self) -> dict[str, Any]:
        """Settings by dotted name."""
        return {name: value for name, value, _ in self.settings}

    def setting(self, name: str) -> Any:
        return self.values.get(name)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The latest event of a kind."""
        return next((e for e in reversed(self.events) if e.get("kind") == kind), None)

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("kind") == kind]

    @property
    def step(self) -> int:
        """Steps behind the weights, or behind the records where no weights are left."""
        return self.weights.step if self.weights else int(self.known.get("steps", 0))

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [e for e in self.events if e.get("kind") in ("start", "resume")]

    @property
    def machine(self) -> dict[str, Any] | None:
        """Where it computed last: `world`, `device`, `layout` in words, `precision`, `environment`."""
        found = next((e for e in reversed(self.starts) if "device" in e), None)
        layout = " x ".join(f"{axis} {size}" for axis, size in found["layout"].items()) if found else ""
        return {**found, "layout": layout or "one process"} if found else None

    @property
    def dates(self) -> tuple[str, str] | None:
        """First and last day of the run, UTC."""
        times = [float(e["time"]) for e in self.events if isinstance(e.get("time"), int | float)]
        return (_day(min(times)), _day(max(times))) if times else None

    @property
    def imported(self) -> str | None:
        """Name of the folder that the first weights were imported from."""
        told = [e["imported"] for e in self.starts if e.get("imported")]
        return str(told[0]) if told else self.weights.imported if self.weights else None

    @property
    def whole(self) -> bool:
        """Whether the weights are those of the end that the records measured."""
        return self.known.get("status") == "done" and self.step == self.known.get("steps")


def read_story(
    run_dir: Path,
    job: Mapping[str, Any],
    weights: Weights | None,
    proof: str,
    used: list[tuple[str, int, int]],
) -> Story:
    """Read a run folder.

    Args:
        job: the resolved job; leaves may carry their origin, as `flatten` reads them.
    """
    settings, rows, events = list(flatten(job)), read_metrics(run_dir), read_events(run_dir)
    known = know(run_dir, rows, events, {name: value for name, value, _ in settings})
    if weights and weights.step < known.get("steps", 0):  # what was counted later is not of these weights
        rows = [row for row in rows if row["step"] <= weights.step]
        for key in (
            "tokens",
            "seconds",
            "tokens_per_second",
            "mfu",
            "train_loss",
            "heldout_loss",
            "memory_gib",
        ):
            known.pop(key, None)
        known |= {k: v for k, v in derive(rows, events).items() if k not in ("status", "steps")}
    return Story(run_dir.resolve().name, settings, rows, events, known, weights, proof, used)


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(seconds))
