"""What everyone who is told about a run understands: W&B, and those of `tracking.backends`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from headway.pretrain.config import Job


@dataclass(frozen=True)
class Table:
    """Rows of plain values under the names of their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | int]]


@dataclass(frozen=True)
class Picture:
    """A PNG, and a line under it."""

    png: bytes
    caption: str = ""


@dataclass(frozen=True)
class Gallery:
    """What people look at of a model in training: samples of what it writes, pictures of what it attends to."""

    tables: Mapping[str, Table] = field(default_factory=dict)
    pictures: Mapping[str, Sequence[Picture]] = field(default_factory=dict)


class Backend(Protocol):
    """Someone who is told about a run, on its first rank. No method may wait for a network, or raise."""

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Numbers of a step; called again for a step (an evaluation), values add up."""

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Something between steps, as `Recorder.event` has it: `start`, `resume`, `checkpoint`, `warning`..."""

    def histograms(self, step: int, histograms: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Counts and the edges of their bins, by name."""

    def show(self, step: int, gallery: Gallery) -> None:
        """Samples and pictures of the model after a step."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        """End of the run: `done`, `stopped`, `failed` or `fenced` (another start of the run writes on under its name:
        leave without a word), and what only its end knows."""


@dataclass(frozen=True)
class Told:
    """What a backend needs to begin.

    Attributes:
        run_dir: the run's folder.
        job: the resolved job.
        start_step: step of the checkpoint that the run goes on from, 0 for a new one.
        warn: to be called with one sentence when something is amiss; the same sentence is shown once.
        say: to be called with what a person wants to know, e.g. an address.
        place: where the run computes, as the event of its start tells it.
        facts: what the run is beside its job and its place: versions, data, sizes; plain values.
    """

    run_dir: Path
    job: Job
    start_step: int
    warn: Callable[[str], None]
    say: Callable[[str], None]
    place: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
