"""Accelerate's trackers from the side of the training process.

Each lives in a process of its own (`tracker_client.py`), behind a pipe (`pipe.py`): several of them send over the
network within the call that tells them a number, others patch what they find, and Accelerate asks the environment
which rank it is, and would join a process group of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from headway.pretrain.config import Job
from headway.pretrain.recipe import as_plain, leaves, one_line
from headway.pretrain.records.backends.base import Gallery, Told
from headway.pretrain.records.backends.pipe import ClientPipe
from headway.pretrain.records.backends.tracker_manners import MANNERS, Manner, filled

RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    *("ACCELERATE_", "FSDP_", "PMI_", "PMIX_", "MPI_", "OMPI_", "MV2_", "NCCL_"),
)
"""How variables begin that tell a rank of the run what it is."""


class AccelerateTracker:
    """One run of one tracker; `trackers/NAME` in the run's folder keeps what names it, the step it was told last, and
    what the tracker keeps on this machine.

    Takes numbers of steps and the job's settings: what Accelerate's trackers have in common.

    Args:
        name: as `tracking.backends` has it.
        finish_timeout: seconds that the end of the run waits for the tracker; of a short run it is still starting then.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, told: Told, name: str, *, finish_timeout: float = 60.0) -> None:
        run_dir, tracking = told.run_dir.resolve(), told.job.tracking
        self._name, self._say = name, told.say
        self._folder = run_dir / "trackers" / name
        manner = MANNERS.get(name, Manner())
        words = {
            "run": told.job.run.name,
            "project": tracking.project or "headway",
            "folder": str(self._folder / "files"),
        }
        self.client = ClientPipe(
            name,
            ["headway.pretrain.records.backends.tracker_client", name],
            self._folder,
            environment(manner, words),
            told.warn,
            self._heard,
            finish_timeout,
        )
        self.client.send(
            do="start",
            name=name,
            run_dir=str(run_dir),
            folder=str(self._folder),
            words=words,
            arguments=tracking.trackers.get(name, {}),
            settings=settings(told.job),
            start_step=told.start_step,
        )

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        numbers = {k: v for k, v in values.items() if k != "step"}
        if numbers:
            self.client.send(do="log", step=step, values=numbers)

    def event(self, kind: str, step: int, fields: Mapping[str, Any]) -> None:
        """Nothing: it takes numbers alone."""

    def histograms(self, step: int, histograms: Mapping[str, tuple[list[float], list[float]]]) -> None:
        """Nothing: it takes numbers alone."""

    def show(self, step: int, gallery: Gallery) -> None:
        """Nothing: it takes numbers alone."""

    def close(self, status: str, summary: Mapping[str, Any]) -> None:
        if status == "fenced":
            return self.client.end(patience=0.0)
        self.client.send(do="finish")
        self.client.finish(
            lambda: "metrics.jsonl has everything, and the run's next start tells what is missing"
        )

    def _heard(self, message: dict[str, Any]) -> None:
        if "run" in message:
            self._say(f"{self._name}: {message['run']}")


def environment(manner: Manner, words: Mapping[str, str]) -> dict[str, str]:
    """Of a tracker's process: it is no rank and has no GPU. What it keeps lies in the run's folder, unless the user
    has said of this tracker where it shall lie."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(RANKS)}
    there = (Path(w).expanduser().exists() if w[0] == "~" else kept.get(w) for w in manner.told_where)
    alone = {} if any(there) else manner.alone
    named = {name: filled(value, words) for name, value in {**manner.always, **alone}.items()}
    return {**named, **kept, "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def settings(job: Job) -> dict[str, bool | int | float | str | None]:
    """The job as trackers take hyperparameters: dotted names and plain values."""
    found: dict[str, bool | int | float | str | None] = {}
    for name, value in leaves(job):
        if isinstance(value, list | tuple):
            value = [as_plain(item) for item in value]
        plain = value is None or isinstance(value, bool | int | float | str)
        found[name] = value if plain else one_line(value)
    return found
