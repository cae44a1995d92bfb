"""What all engines do alike: a step around their forward, backward and update; evaluation; what a run is told."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from headway.parallel.engines.totals import Totals
from headway.parallel.engines.whole import gather
from headway.parallel.mesh import AXES, World
from headway.parallel.pipeline.rules import micro_rows
from headway.parallel.watch import divergence
from headway.pretrain.config import Job
from headway.pretrain.data import used
from headway.pretrain.engine import Batch, State, StepResult, Sums, Watch
from headway.pretrain.errors import NonFiniteError
from headway.pretrain.models.lsuv import lsuv
from headway.pretrain.objectives import LossOutput, Mean, Objective
from headway.pretrain.optim.average import Average
from headway.pretrain.optim.schedules import factor, in_steps

if TYPE_CHECKING:
    from headway.parallel.distill.teacher import Teacher
    from headway.parallel.pipeline.plan import Plan

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}

MUON = {"fp32": torch.float32, "fp64": torch.float64}
"""Dtype of Muon's iteration; where products are narrow, so may it be (None)."""

FIRST_ITERATIONS = 15
"""Power iterations from a random direction, as torch's spectral_norm has them."""


class Stages(Protocol):
    """A pipeline's stages on this rank, as an engine runs them; `parallel.pipeline.run.Pipeline` is torch's."""

    plan: Plan

    def cut(self, batch: Batch) -> list[Batch]:
        """A batch in micro-batches."""

    def train(
        self,
        micros: list[Batch],
        seed: int,
        step: int,
        counts: dict[str, float],
        weight: float,
        kind: str = "",
    ) -> list[LossOutput]:
        """Forward and backward; sums of each micro-batch on the rank of the last stage, nothing elsewhere."""

    def evaluate(self, micros: list[Batch], kind: str = "") -> list[LossOutput]:
        """Forward without noise; sums as those of `train`."""

    def tell(
        self, kind: str, terms: dict[str, Tensor], metrics: dict[str, Mean]
    ) -> tuple[dict[str, Tensor], dict[str, Mean]]:
        """What the last stage has summed, on all ranks of the pipeline."""

    def norm(self) -> float:
        """L2 norm of the gradient of the whole model; equal on all ranks."""

    def loads(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics without the loads of experts that other ranks hold."""

    def elsewhere(self) -> dict[str, Tensor]:
        """Weights and buffers of other ranks of the pipeline, on the meta device."""


class BaseEngine(ABC):
    """See `headway.pretrain.engine.Engine`.

    Gradients of ranks and micro-batches are summed, never averaged: what is differentiated is divided by the global
    counts already.

    Attributes:
        named: parameters of this rank by canonical name.
        pipeline: stages, where the model is cut into some.
        teacher: gives what a student learns from beside the data.
        average: of the weights, if the job wants one.
        scaled: whether gradients may overflow, so that a step is left out.
        blank: the objective before it was spread, on the meta device, where that is how it is brought together.
    """

    named: Mapping[str, nn.Parameter]

    def __init__(self, job: Job, objective: Objective, world: World, *, precision: str) -> None:
        self.job, self.world, self.objective = job, world, objective
        self.precision = precision
        self.before_update: Callable[[], None] = lambda: None
        self.schedule = in_steps(job.schedule, job.train, job.row_tokens)
        self.rows = micro_rows(job, world.layout)
        self.pipeline: Stages | None = None
        self.teacher: Teacher | None = None
        self.average: Average | None = None
        self.scaled = precision == "fp16"
        self.blank: Objective | None = None

    # -- what each engine gives ----------------------------------------------------------------------------

    @abstractmethod
    def _accumulate(self, batch: Batch, step: int, counts: dict[str, float]) -> Totals:
        """Forward and backward over micro-batches; sums of this rank. Gradients are reduced afterwards."""

    @abstractmethod
    def _norm(self) -> Tensor | float:
        """L2 norm of the whole gradient, without a loss scale; equal on all ranks."""

    @abstractmethod
    def _update(self, step: int, norm: float) -> None:
        """Clip and step."""

    @abstractmethod
    def _forget_gradients(self) -> None: ...

    @abstractmethod
    def state(self) -> State:
        """Weights and optimizer state under canonical names; the tensors are the live ones."""

    @abstractmethod
    def load(self, state: State) -> None:
        """Take over numbers; tensors were written in place."""

    @abstractmethod
    def weights_changed(self) -> None:
        """Weights came from elsewhere: what follows them begins anew."""

    def _settle(self, overflow: bool) -> dict[str, float]:
        """After a step: mind the loss scale; what to tell of it."""
        return {}

    def _score(self, batch: Batch) -> LossOutput:
        """Forward without noise of a model that is whole on this rank."""
        return self.objective(batch)

    # -- one step ------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, watch: Watch | None = None) -> StepResult:
        """One optimizer step; see the protocol.

        Raises:
            NonFiniteError: loss or gradient is not finite (fp16: the loss); nothing was updated.
        """
        counts = self._global_counts(batch)
        sums = self._accumulate(batch, step, counts)
        # Asked for before the loss is read: a GPU then goes from the backward to the norm without a pause.
        asked = self._norm()
        loss, metrics = self._means(sums, counts)
        norm = float(asked)
        overflow = not math.isfinite(norm)
        if not math.isfinite(loss) or (overflow and not self.scaled):
            self._forget_gradients()
            raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {norm}")
        if watch:
            watch(self._gradients())
        self.before_update()
        if not overflow:
            self._update(step, norm)
            self.objective.after_update(self.pipeline.loads(metrics) if self.pipeline else metrics)
            if self.average:
                self.average.update()
        told: dict[str, float | list[float]] = {name: value.tolist() for name, value in metrics.items()}
        told |= self._settle(overflow)
        self._forget_gradients()
        if (every := self.job.parallel.check_every) and (step + 1) % every == 0:
            divergence.check(self.state().tensors, self.world, step + 1, every)
        return StepResult(
            loss, norm, int(counts["read"]), int(counts["rows"]), overflow, told, used.from_sums(counts)
        )

    def _global_counts(self, batch: Batch) -> dict[str, float]:
        """What the terms of the loss are divided by, over all ranks."""
        local = self.objective.counts(batch) | used.shares(batch)
        return dict(zip(local, self.world.sum(*local.values()), strict=True))

    def _micros(self, batch: Batch) -> list[Batch]:
        """A batch in micro-batches."""
        count = len(batch["slot"])
        return [{k: v[i : i + self.rows] for k, v in batch.items()} for i in range(0, count, self.rows)]

    def _differentiated(self, out: LossOutput, counts: dict[str, float], weight: float = 1.0) -> Tensor:
        """This micro-batch's share of the loss, times `weight`."""
        parts = [total * (weight / max(counts[name], 1)) for name, total in out.terms.items()]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def _through_stages(
        self, stages: Stages, batch: Batch, step: int, counts: dict[str, float], weight: float
    ) -> Totals:
        """Forward and backward of all micro-batches through a pipeline."""
        sums = Totals(self.world)
        taught, kind = self._taught(stages.cut(batch), step), f"train {self._signature(step)}"
        found = stages.train(list(taught), self.job.train.seed, step, counts, weight, kind)
        sums.add_told(stages, kind, found)
        return sums

    def _taught(self, micros: list[Batch], step: int | None) -> Iterator[Batch]:
        """Micro-batches with what a teacher gives for them."""
        if self.teacher is None:
            return iter(micros)
        return (m | found for m, found in zip(micros, self.teacher.teach(micros, step), strict=True))

    def _signature(self, step: int | None) -> str:
        """What a teacher gives at a step; equal on all ranks."""
        return "" if self.teacher is None else self.teacher.signature(step)

    def _means(self, sums: Totals, counts: dict[str, float]) -> tuple[float, dict[str, Tensor]]:
        """Loss and metrics of the global batch; waits for the device."""
        terms, metrics = sums.over_ranks()
        loss = sum(total / max(counts[name], 1) for name, total in terms.items())
        return loss, {name: total / max(count, 1) for name, (total, count) in metrics.items()}

    def _gradients(self) -> dict[str, Tensor]:
        """Gradients by name, reduced and not yet clipped."""
        return {name: p.grad for name, p in self.named.items() if p.grad is not None}

    def _factor(self, step: int) -> float:
        """The schedule's factor of the learning rate."""
        return factor(step, self.schedule, self.job.train.steps)

    def learning_rate(self, step: int) -> float:
        """Learning rate of AdamW's parameters at a step."""
        return self.job.optimizer.lr * self._factor(step)

    # -- evaluation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> Sums:
        """Summed loss, metrics and their counts over all ranks; all ranks call it together. See the protocol."""
        self.objective.eval()
        sums = Totals(self.world)
        with self._autocast(), self.average.swapped() if self.average else nullcontext():
            if self.pipeline:
                kind = f"evaluate {self._signature(None)}"
                taught = self._taught(self.pipeline.cut(batch), None)
                sums.add_told(self.pipeline, kind, self.pipeline.evaluate(list(taught), kind))
            else:
                sums.add(self._score(next(self._taught([batch], None))))
        self.objective.train()
        terms, metrics = sums.over_ranks()
        scored = self.objective.scored
        found = {"loss": (terms[scored], self._global_counts(batch)[scored])}
        return found | {n: (float(t), c) for n, (t, c) in metrics.items() if t.dim() == 0}

    def whole(self) -> Objective | None:
        """The objective with all its weights on every rank, for samples and pictures; None if it is too large to be
        brought together from ranks that have parts of it. Collective."""
        if self.blank is not None:
            return gather(self.blank, self.state().tensors, self.world)
        if not self.pipeline:
            return self.objective
        from headway.parallel.pipeline.whole import gather as gather_stages

        return gather_stages(self.pipeline.plan, self.objective, self.world)

    # -- state ---------------------------------------------------------------------------------------------

    def elsewhere(self) -> dict[str, Tensor]:
        """Weights and buffers that other stages of a pipeline hold, on the meta device."""
        return self.pipeline.elsewhere() if self.pipeline else {}

    def parameters(self) -> int:
        """Numbers that are trained, in the whole model."""
        here = self.state().tensors
        ours = sum(here[name].numel() for name, p in self.named.items() if p.requires_grad)
        return ours + sum(t.numel() for t in self.elsewhere().values() if isinstance(t, nn.Parameter))

    def scale_weights(self, batch: Batch) -> None:
        """LSUV on this rank's rows of a global batch; all ranks call it together."""

        def forward() -> None:
            self.objective(batch)
            self._forget_gathered()

        lsuv(self.objective, forward, lambda values: self.world.sum(*values, along=AXES))
        self.weights_changed()

    # -- pieces --------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager[Any]:
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else nullcontext()

    def _forget_gathered(self) -> None:  # noqa: B027  (most keep nothing)
        """Drop what is kept gathered of parameters whose parts have changed."""


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state, by canonical name."""
    found = {}
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found
