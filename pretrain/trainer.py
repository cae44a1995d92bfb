"""The training loop, written for one device: it knows neither ranks nor meshes, engines do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from headway.pretrain.config import Job
from headway.pretrain.engine import Batch, Engine, StepResult
from headway.pretrain.errors import Interrupted, NonFiniteError


class Recorder(Protocol):
    """Who is told about steps and events."""

    def step(self, values: dict) -> None: ...
    def event(self, kind: str, **fields: object) -> None: ...


@dataclass(frozen=True)
class Yardstick:
    """What turns seconds into model FLOP utilisation.

    Attributes:
        flops_per_token: forward and backward of the model, without recomputation.
        peak: FLOP/s of all devices of the run together.
    """

    flops_per_token: float
    peak: float


@dataclass
class Trainer:
    """Steps from where the run stands to `train.steps`, with evaluations and checkpoints on the way.

    Attributes:
        batches: endless iterator over this rank's rows of successive global batches.
        save: writes a checkpoint after that many steps.
        evaluate: held-out loss on at most that many rows (None: all), in nats a token.
        stop_asked: whether any rank was asked to stop; equal on all ranks.
        name_samples: names of the samples of a step's global batch, for error messages.
        memory: peak memory of this process so far, in GiB.
    """

    job: Job
    engine: Engine
    batches: Iterator[Batch]
    recorder: Recorder
    yardstick: Yardstick
    save: Callable[[int], None]
    evaluate: Callable[[int | None], dict[str, float]]
    stop_asked: Callable[[], bool]
    name_samples: Callable[[int], str]
    memory: Callable[[], float]
    tokens: int = 0

    def run(self, done: int) -> None:
        """Train from step `done` on.

        Raises:
            Interrupted: asked to stop; the state is saved.
            NonFiniteError: names the step and its samples; the last checkpoint stands.
        """
        steps, every = self.job.train.steps, self.job.checkpoint.every
        saved = done
        for step in range(done, steps):
            self._step(step)
            finished = step + 1
            if every and finished % every == 0 and finished < steps:
                self.save(finished)
                saved = finished
            if self.stop_asked():
                if saved != finished:
                    self.save(finished)
                raise Interrupted(f"asked to stop: saved after step {finished} of {steps}; start again to go on")
        if saved != steps:
            self.save(steps)

    def _step(self, step: int) -> None:
        begin = time.perf_counter()
        batch = next(self.batches)
        try:
            result = self.engine.train_step(batch, step)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; samples: {self.name_samples(step)}") from None
        seconds = time.perf_counter() - begin
        values = self._values(step, result, seconds)
        every = self.job.train.eval_every
        if every and (step + 1) % every == 0 and step + 1 < self.job.train.steps:
            values |= self.evaluate(self.job.train.eval_rows)
        self.recorder.step(values)

    def _values(self, step: int, result: StepResult, seconds: float) -> dict:
        self.tokens += result.tokens
        rate = result.tokens / seconds
        return {
            "step": step + 1,
            "loss": result.loss,
            "lr": self.engine.learning_rate(step),
            "grad_norm": result.grad_norm,
            "tokens": self.tokens,
            "tokens_per_second": rate,
            "step_seconds": seconds,
            "mfu": rate * self.yardstick.flops_per_token / self.yardstick.peak,
            "memory_gib": self.memory(),
            **result.metrics,
        }
