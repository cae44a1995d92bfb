"""The training loop, written for one device: it knows neither ranks nor meshes, engines do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from headway.pretrain.config import Job
from headway.pretrain.data.ledger import Ledger
from headway.pretrain.energy.counter import Reading
from headway.pretrain.engine import Batch, Engine, StepResult
from headway.pretrain.errors import Interrupted, NonFiniteError
from headway.pretrain.records.metrics import step_values
from headway.pretrain.records.records import Recorder


@dataclass(frozen=True)
class Agreement:
    """What all ranks tell each other at the end of a step.

    Attributes:
        stop: whether any was asked to stop.
        energy: of all ranks together, since they last agreed; None where none is measured.
    """

    stop: bool
    energy: Reading | None = None


class Saver(Protocol):
    """Writes checkpoints, perhaps in the background."""

    def save(self, step: int) -> None:
        """Save the state after that many steps."""

    def poll(self) -> None:
        """Tell what was published and what went wrong since."""

    def finish(self) -> bool:
        """Wait for what is being written; whether the last save was published."""


@dataclass(frozen=True)
class Yardstick:
    """What turns seconds into model FLOP utilisation.

    Attributes:
        flops_per_row: forward and backward of the model on a sample, without recomputation.
        peak: FLOP/s of all devices of the run together.
    """

    flops_per_row: float
    peak: float


@dataclass
class Trainer:
    """Steps from where the run stands to `train.steps`, with evaluations and checkpoints on the way.

    Attributes:
        batches: endless iterator over this rank's rows of successive global batches.
        saver: writes checkpoints.
        evaluate: held-out loss on at most that many rows (None: all), in nats a token.
        agree: what all ranks learn of each other after each step; equal on all ranks.
        name_samples: names of the samples of the last global batch, for error messages.
        memory: peak memory of this process so far, in GiB.
        ledger: is told which samples steps used; on the rank that writes records.
        show_samples: tells the recorder what the model does with samples after a step.
    """

    job: Job
    engine: Engine
    batches: Iterator[Batch]
    recorder: Recorder
    yardstick: Yardstick
    saver: Saver
    evaluate: Callable[[int | None], dict[str, float]]
    agree: Callable[[], Agreement]
    name_samples: Callable[[], str]
    memory: Callable[[], float]
    ledger: Ledger | None = None
    show_samples: Callable[[int], None] | None = None
    step: int = 0
    """The step that is being done, from 1."""

    def run(self, done: int) -> None:
        """Train from step `done` on.

        Raises:
            Interrupted: asked to stop; the state is saved.
            NonFiniteError: names the step and its samples; the last checkpoint stands.
        """
        steps, every = self.job.train.steps, self.job.checkpoint.every
        saved = done
        if done == 0 and self.job.train.eval_every:
            self.recorder.event("eval", **self.evaluate(self.job.train.eval_rows))
        for step in range(done, steps):
            stop = self._step(step)
            self.saver.poll()
            finished = step + 1
            if every and finished % every == 0 and finished < steps:
                self.saver.save(finished)
                saved = finished
            if stop:
                if saved != finished:
                    self.saver.save(finished)
                raise Interrupted(self._last_word(finished))
        if saved != steps:
            self.saver.save(steps)

    def _last_word(self, finished: int) -> str:
        """Wait for the last checkpoint, and say what became of it."""
        place = f"step {finished} of {self.job.train.steps}"
        if self.saver.finish():
            return f"asked to stop: saved after {place}; start again to go on"
        return f"asked to stop after {place}, which could not be saved; start again to go on from the checkpoint before"

    def _step(self, step: int) -> bool:
        """One step, its record, and the evaluation after it; whether any rank was asked to stop."""
        begin = time.perf_counter()
        number = self.step = step + 1
        batch = next(self.batches)
        watch = None
        if self.recorder.wants_histograms(number):
            watch = partial(self.recorder.histograms, number)
        try:
            result = self.engine.train_step(batch, step, watch)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; samples: {self.name_samples()}") from None
        if self.ledger:
            self.ledger.step(number, result.used)
        seconds = time.perf_counter() - begin
        agreed = self.agree()
        self.recorder.step(self._values(step, result, seconds, agreed.energy))
        every = self.job.train.eval_every
        if every and number % every == 0 and number < self.job.train.steps:
            self.recorder.event("eval", **self.evaluate(self.job.train.eval_rows))
        every = self.job.tracking.samples_every
        if self.show_samples and every and number % every == 0 and number < self.job.train.steps:
            self.show_samples(number)
        return agreed.stop

    def _values(self, step: int, result: StepResult, seconds: float, energy: Reading | None) -> dict:
        return step_values(
            step + 1,
            result,
            lr=self.engine.learning_rate(step),
            seconds=seconds,
            flops=result.rows * self.yardstick.flops_per_row,
            peak=self.yardstick.peak,
            memory_gib=self.memory(),
            energy=energy,
        )
