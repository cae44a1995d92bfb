"""The native engine: DDP, FSDP2 and HSDP by torch alone. Default, and the reference for the others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from headway.parallel.apply import apply
from headway.parallel.mesh import AXES, PARTS, World
from headway.parallel.pipeline.plan import make_plan
from headway.parallel.pipeline.rules import micro_rows
from headway.parallel.watch import divergence
from headway.pretrain.config import Job
from headway.pretrain.data import used
from headway.pretrain.engine import Batch, State, StepResult, Sums, Watch
from headway.pretrain.errors import NonFiniteError
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.lsuv import lsuv
from headway.pretrain.objectives import LossOutput, Mean, Objective
from headway.pretrain.optim.average import Average
from headway.pretrain.optim.build import build_optimizers, set_rate
from headway.pretrain.optim.clipping import global_norm, scale_gradients_
from headway.pretrain.optim.scaler import LossScale
from headway.pretrain.optim.schedules import factor, in_steps
from headway.pretrain.optim.sharded import reduced

if TYPE_CHECKING:
    from headway.parallel.distill.teacher import Teacher
    from headway.parallel.pipeline.run import Pipeline

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}
MUON = {"fp32": torch.float32, "fp64": torch.float64}
"""Dtype of Muon's iteration; where products are narrow, so may it be (None)."""


FIRST_ITERATIONS = 15
"""Power iterations from a random direction, as torch's spectral_norm has them."""


class NativeEngine:
    """See `headway.pretrain.engine.Engine`.

    Weights, moments and reductions are fp32 (fp64 for fp64); bf16 and fp16 are autocast around the forward; fp8 is
    bf16 with other products in blocks.
    """

    def __init__(
        self, job: Job, objective: Objective, world: World, *, precision: str, compiled: bool
    ) -> None:
        self.job, self.world, self.objective = job, world, objective
        self.precision = precision
        self.before_update: Callable[[], None] = lambda: None
        plan = make_plan(objective, job, world.layout) if world.layout.pipeline > 1 else None
        names = [name for name, _ in objective.named_parameters()]
        self.call = apply(objective, job, world, precision=precision, compiled=compiled, plan=plan)
        self.named = dict(objective.named_parameters())
        self.optimizers = build_optimizers(self.named.items(), job.optimizer, MUON.get(precision), names)
        self.scale = LossScale() if precision == "fp16" else None
        self.schedule = in_steps(job.schedule, job.train, job.row_tokens)
        self.rows = micro_rows(job, world.layout)
        self.pipeline: Pipeline | None = None
        if plan:
            from headway.parallel.pipeline.run import Pipeline

            schedule = job.parallel.schedule
            self.pipeline = Pipeline(plan, objective, self.named, world, schedule, self.rows, self._autocast)
        self.teacher: Teacher | None = None
        self.average: Average | None = None
        self.weights_changed()
        for optimizer in self.optimizers:
            _allocate_state(optimizer)

    # -- one step ------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, watch: Watch | None = None) -> StepResult:
        """One optimizer step; see the protocol.

        Raises:
            NonFiniteError: loss or gradient is not finite (fp16: the loss); nothing was updated.
        """
        counts = self._global_counts(batch)
        sums = self._accumulate(batch, step, counts)
        if self.scale:
            scale_gradients_(self.named.values(), 1.0 / self.scale.scale)
        # Asked for before the loss is read: a GPU then goes from the backward to the norm without a pause.
        asked = self.pipeline.norm() if self.pipeline else global_norm(self.named.values())
        loss, metrics = self._means(sums, counts)
        norm = float(asked)
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.scale is None):
            self._forget_gradients()
            raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {norm}")
        if watch:
            watch({name: p.grad for name, p in self.named.items() if p.grad is not None})
        skipped = not math.isfinite(norm)
        self.before_update()
        if not skipped:
            self._update(step, norm)
            self.objective.after_update(self.pipeline.loads(metrics) if self.pipeline else metrics)
            if self.average:
                self.average.update()
        told: dict[str, float | list[float]] = {name: value.tolist() for name, value in metrics.items()}
        if self.scale:
            self.scale.update(overflow=skipped)
            told["loss_scale"] = self.scale.scale
        self._forget_gradients()
        if (every := self.job.parallel.check_every) and (step + 1) % every == 0:
            divergence.check(self.state().tensors, self.world, step + 1, every)
        return StepResult(
            loss, norm, int(counts["read"]), int(counts["rows"]), skipped, told, used.from_sums(counts)
        )

    def _global_counts(self, batch: Batch) -> dict[str, float]:
        """What the terms of the loss are divided by, over all ranks."""
        local = self.objective.counts(batch) | used.shares(batch)
        return dict(zip(local, self.world.sum(*local.values()), strict=True))

    def _accumulate(self, batch: Batch, step: int, counts: dict[str, float]) -> Totals:
        """Forward and backward over micro-batches; sums of this rank. Gradients are reduced afterwards."""
        weight = self.scale.scale if self.scale else 1.0
        sums = Totals(self.world)
        if self.pipeline:
            taught, kind = self._taught(self.pipeline.cut(batch), step), f"train {self._signature(step)}"
            seed = self.job.train.seed
            sums.add_told(
                self.pipeline, kind, self.pipeline.train(list(taught), seed, step, counts, weight, kind)
            )
        else:
            self._accumulate_alone(batch, step, counts, weight, sums)
        for name, parameter in self.named.items():
            if parameter.grad is not None:
                parameter.grad = None if self._frozen(name, step) else reduced(parameter.grad)
        return sums

    def _taught(self, micros: list[Batch], step: int | None) -> Iterator[Batch]:
        """Micro-batches with what a teacher gives for them."""
        if self.teacher is None:
            return iter(micros)
        return (m | found for m, found in zip(micros, self.teacher.teach(micros, step), strict=True))

    def _signature(self, step: int | None) -> str:
        """What a teacher gives at a step; equal on all ranks."""
        return "" if self.teacher is None else self.teacher.signature(step)

    def _frozen(self, name: str, step: int) -> bool:
        """Whether a parameter rests at a step."""
        distillation = self.objective.distillation
        return distillation is not None and distillation.frozen(name, step)

    def _means(self, sums: Totals, counts: dict[str, float]) -> tuple[float, dict[str, Tensor]]:
        """Loss and metrics of the global batch; waits for the device."""
        terms, metrics = sums.over_ranks()
        loss = sum(total / max(counts[name], 1) for name, total in terms.items())
        return loss, {name: total / max(count, 1) for name, (total, count) in metrics.items()}

    def _accumulate_alone(
        self, batch: Batch, step: int, counts: dict[str, float], weight: float, sums: Totals
    ) -> None:
        """Forward and backward of all stages on this rank."""
        micros = [
            {k: v[i : i + self.rows] for k, v in batch.items()}
            for i in range(0, len(batch["slot"]), self.rows)
        ]
        if isinstance(self.call, DistributedDataParallel):
            weight *= self.world.layout.data  # DDP averages; the sum is wanted
        for i, micro in enumerate(self._taught(micros, step)):
            with self._sync(last=i == len(micros) - 1):
                with self._autocast():
                    out = self.call(micro, Noise.at(self.job.train.seed, step, micro["slot"]))
                parts = [total * (weight / max(counts[name], 1)) for name, total in out.terms.items()]
                torch.stack(parts).sum().backward() if len(parts) > 1 else parts[0].backward()
            sums.add(out)

    def _update(self, step: int, norm: float) -> None:
        clip = self.job.optimizer.clip
        if clip and norm > clip:
            scale_gradients_(self.named.values(), clip / norm)
        set_rate(self.optimizers, self._factor(step))
        for optimizer in self.optimizers:
            optimizer.step()

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
                taught, kind = (
                    self._taught(self.pipeline.cut(batch), None),
                    f"evaluate {self._signature(None)}",
                )
                sums.add_told(self.pipeline, kind, self.pipeline.evaluate(list(taught), kind))
            else:
                sums.add(self.objective(next(self._taught([batch], None))))
        self.objective.train()
        terms, metrics = sums.over_ranks()
        scored = self.objective.scored
        found = {"loss": (terms[scored], self._global_counts(batch)[scored])}
        return found | {n: (float(t), c) for n, (t, c) in metrics.items() if t.dim() == 0}

    def whole(self) -> Objective | None:
        """The objective with all its weights on every rank, for samples and pictures; None if it is too large to be
        brought together from the stages of a pipeline. Collective."""
        if not self.pipeline:
            return self.objective
        from headway.parallel.pipeline.whole import gather

        return gather(self.pipeline.plan, self.objective, self.world)

    # -- state ---------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Weights and optimizer state under canonical names; the tensors are the live ones."""
        names = {id(p): n for n, p in self.named.items()}
        tensors = {name: p.detach() for name, p in self.named.items() if p.requires_grad}
        tensors |= persistent_buffers(self.objective)
        if self.average:
            tensors |= {f"ema.{name}": tensor for name, tensor in self.average.state().items()}
        for optimizer in self.optimizers:
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
        return State(tensors, {"loss_scale": self.scale.state()} if self.scale else {})

    def elsewhere(self) -> dict[str, Tensor]:
        """Weights and buffers that other stages of a pipeline hold, on the meta device."""
        return self.pipeline.elsewhere() if self.pipeline else {}

    def load(self, state: State) -> None:
        if self.scale and "loss_scale" in state.numbers:
            self.scale.load(state.numbers["loss_scale"])

    def weights_changed(self) -> None:
        """Weights came from elsewhere: what follows them begins anew."""
        self.objective.iterate(FIRST_ITERATIONS)
        if self.job.optimizer.ema:
            self.average = Average(self.named.items(), self.job.optimizer.ema, self._forget_gathered)

    def scale_weights(self, batch: Batch) -> None:
        """LSUV on this rank's rows of a global batch; all ranks call it together."""

        def forward() -> None:
            self.objective(batch)
            self._forget_gathered()

        lsuv(self.objective, forward, lambda values: self.world.sum(*values, along=AXES))
        self.weights_changed()

    # -- pieces --------------------------------------------------------------------------------------------

    def _autocast(self) -> AbstractContextManager:
        dtype = AUTOCAST.get(self.precision)
        return torch.autocast(self.world.device.type, dtype) if dtype else nullcontext()

    def _sync(self, *, last: bool) -> AbstractContextManager:
        """Reduce gradients in the last micro-batch only."""
        if isinstance(self.call, DistributedDataParallel) and not last:
            return self.call.no_sync()
        if isinstance(self.objective, FSDPModule):
            self.objective.set_requires_gradient_sync(last)
        return nullcontext()

    def _forget_gathered(self) -> None:
        """Drop parameters that FSDP still holds gathered: the shards have changed."""
        for module in self.objective.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _forget_gradients(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None


class Totals:
    """Sums of a loss's terms and metrics over micro-batches, then over ranks, with one copy from the device.

    Along the axes of PARTS every rank has its share of each sum; along the others they have the same.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.terms: dict[str, Tensor] = {}
        self.metrics: dict[str, Mean] = {}

    def add(self, out: LossOutput) -> None:
        for name, total in out.terms.items():
            total = total.detach()
            self.terms[name] = self.terms[name] + total if name in self.terms else total
        for name, (total, count) in out.metrics.items():
            known = self.metrics.get(name)
            self.metrics[name] = Mean(known.sum + total, known.over + count) if known else Mean(total, count)

    def add_told(self, pipeline: Pipeline, kind: str, found: list[LossOutput]) -> None:
        """Add what the last stage has found, which other stages are told."""
        for out in found:
            self.add(out)
        self.terms, self.metrics = pipeline.tell(kind, self.terms, self.metrics)

    def over_ranks(self) -> tuple[dict[str, float], dict[str, tuple[Tensor, float]]]:
        """Sums of the terms; sum (a tensor on CPU) and count of each metric."""
        pieces = [*self.terms.values(), *(piece for mean in self.metrics.values() for piece in mean)]
        flat = torch.cat([piece.detach().reshape(-1).double() for piece in pieces])
        reduced = torch.tensor(self.world.sum(*flat.tolist(), along=PARTS), dtype=torch.float64)
        whole = [
            part.reshape(piece.shape)
            for part, piece in zip(reduced.split([p.numel() for p in pieces]), pieces, strict=True)
        ]
        terms = {name: float(part) for name, part in zip(self.terms, whole, strict=False)}
        rest = iter(whole[len(terms) :])
        return terms, {name: (next(rest), float(next(rest))) for name in self.metrics}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Buffers that are part of the state, by canonical name."""
    found = {}
    for prefix, child in module.named_modules():
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                found[f"{prefix}.{name}" if prefix else name] = buffer
    return found


def _allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the moments now, all zero, so that a checkpoint can be read into them.

    A step with zero gradients and zero learning rate does so in every torch optimizer and moves nothing.
    """
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None
    for value in chain.from_iterable(entries.values() for entries in optimizer.state.values()):
        if isinstance(value, Tensor):
            value.zero_()
