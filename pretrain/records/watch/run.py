"""What is known of a run from its folder, kept up to date."""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from headway.pretrain.records.watch.tail import Tail

Events = list[dict[str, Any]]

COLUMNS = (
    "loss", "heldout_loss", "lr", "grad_norm", "tokens", "tokens_per_second", "step_seconds", "mfu", "memory_gib",
    "joules",
)  # fmt: skip
"""Of `metrics.jsonl` these are kept; a run may have a million steps."""
FILES = ("job.yaml", "events.jsonl", "metrics.jsonl")
"""A folder that holds one of these is a run's."""
RECENT = 50
"""Steps that tell how fast a run is now."""


def is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


@dataclass
class Curves:
    """Columns of numbers over steps, which increase; NaN where a step has none."""

    steps: array = field(default_factory=lambda: array("q"))
    values: dict[str, array] = field(default_factory=lambda: {name: array("d") for name in COLUMNS})

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a step; a step that is there already, and what follows it, gives way."""
        step = row.get("step")
        if not isinstance(step, int):
            return
        while self.steps and self.steps[-1] >= step:
            self.steps.pop()
            for column in self.values.values():
                column.pop()
        self.steps.append(step)
        for name, column in self.values.items():
            value = row.get(name)
            column.append(float(value) if isinstance(value, int | float) else math.nan)

    def column(self, name: str) -> NDArray[np.float64]:
        return np.array(self.values[name], dtype=np.float64)

    def column_of_steps(self) -> NDArray[np.int64]:
        return np.array(self.steps, dtype=np.int64)

    def last(self, name: str) -> tuple[int, float] | None:
        """The newest value that is one, with its step."""
        column = self.values[name]
        found = (i for i in range(len(column) - 1, -1, -1) if not math.isnan(column[i]))
        index = next(found, None)
        return None if index is None else (self.steps[index], column[index])

    def recent(self, name: str) -> float | None:
        """Median of the last steps: what one slow step does not move."""
        values = [v for v in self.values[name][-RECENT:] if math.isfinite(v)]
        return median(values) if values else None

    def total(self, name: str) -> float:
        return float(np.nansum(self.column(name)))


@dataclass(frozen=True)
class Saved:
    """A published checkpoint; `size` in bytes, None if it is gone."""

    step: int
    time: float
    size: int | None


class WatchedRun:
    """A run folder. `refresh` reads what is new; nothing is ever written.

    Attributes:
        job: the resolved job as a plain tree, empty until it is there.
        events: starts, resumes, warnings, evaluations, checkpoints and ends, in order.
        curves: the numbers of steps.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job: dict[str, Any] = {}
        self.events: Events = []
        self.curves = Curves()
        self._metrics, self._happened = Tail(folder / "metrics.jsonl"), Tail(folder / "events.jsonl")
        self._job_stamp: tuple[int, int] | None = None
        self._sizes: dict[int, int] = {}

    def refresh(self) -> None:
        """Read what was written since the last call."""
        other, rows = self._metrics.read()
        if other:
            self.curves = Curves()
        for row in rows:
            self.curves.add(row)
        other, events = self._happened.read()
        self.events = events if other else self.events + events
        self._read_job()

    @property
    def name(self) -> str:
        return clean(self.folder.resolve().name)

    @property
    def steps(self) -> int | None:
        """How many there will be."""
        steps = self.setting("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def seconds_left(self) -> float | None:
        """Until the last step, at the present pace."""
        pace = self.curves.recent("step_seconds")
        if pace is None or self.steps is None or not self.curves.steps:
            return None
        return max(0, self.steps - self.curves.steps[-1]) * pace

    @property
    def active(self) -> float:
        """When something was last written, in seconds since the epoch; 0 if never."""
        return max(self._metrics.changed, self._happened.changed)

    @property
    def start(self) -> dict[str, Any]:
        """The latest start or resume, with where it computes; empty if there is none."""
        return next((e for e in reversed(self.events) if e.get("kind") in ("start", "resume")), {})

    @property
    def saved(self) -> Saved | None:
        """The newest checkpoint."""
        event = next((e for e in reversed(self.events) if e.get("kind") == "checkpoint"), None)
        if event is None or not isinstance(event.get("step"), int):
            return None
        return Saved(event["step"], float(event.get("time", 0)), self._size(event["step"]))

    def setting(self, name: str) -> Any:
        """A setting of the job by its dotted name; None if it is not there."""
        place: Any = self.job
        for part in name.split("."):
            place = place.get(part) if isinstance(place, dict) else None
        return place

    def _size(self, step: int) -> int | None:
        if step not in self._sizes:
            folder = self.folder / "checkpoints" / f"step_{step:08d}"
            try:
                self._sizes[step] = sum(path.stat().st_size for path in folder.iterdir())
            except OSError:
                return None
        return self._sizes[step]

    def _read_job(self) -> None:
        """Plainly: a job of another version of Headway can be watched too."""
        path = self.folder / "job.yaml"
        try:
            stamp = (path.stat().st_ino, path.stat().st_mtime_ns)
            if stamp != self._job_stamp:
                found = yaml.safe_load(path.read_text(encoding="utf-8"))
                self.job, self._job_stamp = found if isinstance(found, dict) else {}, stamp
        except (OSError, ValueError, yaml.YAMLError):
            return


def clean(text: object) -> str:
    """Text on one line, without signs that a terminal would obey."""
    return "".join(sign if sign.isprintable() else " " for sign in str(text)).strip()
