"""What the training loop tells about a run, said once: to `metrics.jsonl`, W&B and whoever watches."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor

from headway.pretrain.config import Job
from headway.pretrain.energy.account import lost
from headway.pretrain.records.backends import open_backends
from headway.pretrain.records.backends.base import Backend, Gallery, Told
from headway.pretrain.records.backends.wandb import wandb_mode
from headway.pretrain.records.metrics import MetricsFile, encode, read_metrics
from headway.pretrain.records.process import identify
from headway.pretrain.records.progress import ProgressDisplay


class Recorder(Protocol):
    """The whole of what a training loop needs; rank 0 holds `Records`, the others `NoRecords`."""

    def step(self, values: Mapping[str, Any]) -> None:
        """One finished optimizer step; `values` as `step_values` makes them."""

    def event(self, kind: str, **fields: Any) -> None:
        """Something between steps: `eval`, `checkpoint`, `warning`, or a kind of the caller's own.

        `eval`: numbers, which join the line of the last step. `checkpoint`: `step` and `path`.
        `warning`: `message`, and `about` if it is of a checkpoint. `failure`: `error`, the name of its class, and
        `message`.
        """

    def wants_histograms(self, step: int) -> bool:
        """Whether gradients of this step are to be handed to `histograms`."""

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Distributions of tensors by name, usually gradients, before the optimizer changes them."""

    def show(self, gallery: Gallery) -> None:
        """Samples and pictures of the model as it is."""

    def close(self, status: str = "done", summary: Mapping[str, Any] | None = None) -> None:
        """End of the run: `done`, `stopped` (will be started again), `failed`, or `fenced`: another start of it goes
        on, and the records are that one's."""


class NoRecords:
    """Keeps nothing: every rank but the first."""

    def step(self, values: Mapping[str, Any]) -> None: ...

    def event(self, kind: str, **fields: Any) -> None: ...

    def wants_histograms(self, step: int) -> bool:
        return False

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None: ...

    def show(self, gallery: Gallery) -> None: ...

    def close(self, status: str = "done", summary: Mapping[str, Any] | None = None) -> None: ...


class Records:
    """Keeps everything; no full disk and no dead W&B server stops the run, and each trouble is told once.

    Beside `metrics.jsonl`, `events.jsonl` keeps what happened when: starts, checkpoints, warnings, the end.
    It is never cut: after a crash it shows both lives of the run, and what the first did in vain.

    Args:
        run_dir: the run's folder.
        job: the resolved job; W&B gets it as the run's config.
        start_step: step of the checkpoint that the run goes on from, 0 for a new one.
        facts: what the run is beside its job, as `Told` has it.
        mode: `online`, `offline` or `off`, from `wandb_mode`.
        place: where the run computes, which the event of its start tells: `world`, `hosts`, `layout`...
        stream: where progress goes; standard output if not given.
    """

    def __init__(
        self,
        run_dir: Path,
        job: Job,
        start_step: int = 0,
        *,
        mode: str = "off",
        place: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        stream: TextIO | None = None,
    ) -> None:
        self._run_dir, self._told = run_dir, set[str]()
        self._histograms_every = job.tracking.histograms_every
        self._step = start_step
        begun = lost(read_metrics(run_dir), start_step)  # before these steps are cut off
        self._metrics = MetricsFile(run_dir / "metrics.jsonl", start_step)
        self._tokens = self._metrics.last.get("tokens_seen") or tokens_of(run_dir)
        self._progress = ProgressDisplay(job.train.steps, start_step, stream=stream)
        self.backends: list[Backend] = []
        place = dict(place or {})
        kind = "start" if start_step == 0 else "resume"
        self.event(kind, step=start_step, **place, process=identify(), **begun)
        told = Told(run_dir, job, start_step, self._warn, self._progress.say, place, dict(facts or {}))
        self.backends = open_backends(told, mode)

    def step(self, values: Mapping[str, Any]) -> None:
        self._step = int(values["step"])
        if "tokens" in values:
            self._tokens += int(values["tokens"])
            values = {**values, "tokens_seen": self._tokens}
        self._try(self._metrics.write, values)
        self._log(numbers(values))
        self._progress.step(values)

    def event(self, kind: str, **fields: Any) -> None:
        fields = {"step": self._step, **fields}
        self._try(self._append_event, {"time": time.time(), "kind": kind, **fields})
        if kind == "eval":
            values = numbers({k: v for k, v in fields.items() if k != "step"})
            self._try(self._metrics.amend, values)
            self._log(values)
            shown = "  ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in values.items())
            self._progress.say(f"step {fields['step']}  {shown}")
        elif kind == "warning":
            self._progress.say(f"warning: {fields['message']}")
        for backend in self.backends:
            backend.event(kind, int(fields["step"]), fields)

    def _log(self, values: Mapping[str, float | int]) -> None:
        for backend in self.backends:
            backend.log(self._step, values)

    def wants_histograms(self, step: int) -> bool:
        return bool(self.backends and self._histograms_every and step % self._histograms_every == 0)

    def histograms(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        found = {f"gradients/{name}": histogram(t) for name, t in tensors.items()}
        for backend in self.backends:
            backend.histograms(step, {name: h for name, h in found.items() if h})

    def show(self, gallery: Gallery) -> None:
        for backend in self.backends:
            backend.show(self._step, gallery)

    def close(self, status: str = "done", summary: Mapping[str, Any] | None = None) -> None:
        self._progress.close()
        for backend in self.backends:
            backend.close(status, numbers(summary or {}))
        if status != "fenced":
            self.event("end", status=status)
        self._metrics.close()

    def _warn(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            self.event("warning", message=message)

    def _append_event(self, fields: Mapping[str, Any]) -> None:
        line = encode(fields)
        file = os.open(self._run_dir / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            os.write(file, line)
        finally:
            os.close(file)

    def _try(self, write: Any, values: Mapping[str, Any]) -> None:
        try:
            write(values)
        except OSError as error:
            self._warn(
                f"{self._run_dir}: {error.strerror or error}; the run goes on without its latest records"
            )


def open_records(
    run_dir: Path,
    job: Job,
    *,
    start_step: int = 0,
    rank: int = 0,
    place: Mapping[str, Any] | None = None,
    facts: Mapping[str, Any] | None = None,
    stream: TextIO | None = None,
) -> Recorder:
    """Records on rank 0, silence on the others; JobError if `tracking.wandb` asks for what cannot be."""
    if rank != 0:
        return NoRecords()
    mode = wandb_mode(job.tracking.wandb)
    return Records(run_dir, job, start_step, mode=mode, place=place, facts=facts, stream=stream)


def tokens_of(run_dir: Path) -> int:
    """Tokens of all steps so far, of a run whose lines do not say it."""
    return sum(int(row.get("tokens", 0)) for row in read_metrics(run_dir))


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """Everything that `Records.event` noted, in order; lines that a killed process left torn are left out."""
    events = []
    path = run_dir / "events.jsonl"
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            events.append(json.loads(line))
        except ValueError:
            continue
    return events


def numbers(values: Mapping[str, Any]) -> dict[str, float | int]:
    """What of `values` can be drawn over steps: plain numbers, also for tensors, NumPy's, and members of lists."""
    spread = {f"{k}/{i}": x for k, v in values.items() if isinstance(v, list) for i, x in enumerate(v)}
    found = {k: v.item() if hasattr(v, "item") else v for k, v in {**values, **spread}.items()}
    return {k: v for k, v in found.items() if isinstance(v, int | float)}


def histogram(tensor: Tensor, bins: int = 64) -> tuple[list[float], list[float]] | None:
    """Counts and the bins + 1 edges of the finite values; None if there are none.

    Of a DTensor, this rank's shard: a distribution needs no collective, which other ranks would have to join.
    """
    tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    values = tensor.detach().float().flatten()
    values = values[torch.isfinite(values)]
    if not values.numel():
        return None
    low, high = values.min().item(), values.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts = torch.histc(values, bins, low, high)  # on the tensor's own device
    return counts.tolist(), torch.linspace(low, high, bins + 1, dtype=torch.float64).tolist()
