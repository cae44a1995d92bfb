"""The native engine: DDP, FSDP2 and HSDP by torch alone. Default, and the reference for the others."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import chain

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from headway.parallel.apply import apply
from headway.parallel.mesh import World, rows_per_micro_batch
from headway.pretrain.config import Job
from headway.pretrain.engine import Batch, State, StepResult, Watch
from headway.pretrain.errors import NonFiniteError
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import CausalLM
from headway.pretrain.optim.build import build_optimizers, set_rate
from headway.pretrain.optim.clipping import global_norm, scale_gradients_
from headway.pretrain.optim.scaler import LossScale
from headway.pretrain.optim.schedules import factor

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
MUON = {"fp32": torch.float32, "fp64": torch.float64}
"""Dtype of Muon's iteration; where products are narrow, so may it be (None)."""


class NativeEngine:
    """See `headway.pretrain.engine.Engine`.

    Weights, moments and reductions are fp32 (fp64 for fp64); bf16 and fp16 are autocast around the forward.
    """

    def __init__(
        self, job: Job, objective: CausalLM, world: World, *, precision: str, compiled: bool
    ) -> None:
        self.job, self.world, self.objective = job, world, objective
        self.precision = precision
        self.before_update: Callable[[], None] = lambda: None
        self.call = apply(objective, job, world, compiled=compiled)
        self.named = dict(objective.named_parameters())
        self.optimizers = build_optimizers(self.named.items(), job.optimizer, MUON.get(precision))
        self.scale = LossScale() if precision == "fp16" else None
        self.rows = rows_per_micro_batch(job, world.layout.data)
        for optimizer in self.optimizers:
            _allocate_state(optimizer)

    # -- one step ------------------------------------------------------------------------------------------

    def train_step(self, batch: Batch, step: int, watch: Watch | None = None) -> StepResult:
        """One optimizer step; see the protocol.

        Raises:
            NonFiniteError: loss or gradient is not finite (fp16: the loss); nothing was updated.
        """
        tokens = int(self.world.sum(self.objective.valid_tokens(batch))[0])
        loss, metrics = self._accumulate(batch, step, tokens)
        if self.scale:
            scale_gradients_(self.named.values(), 1.0 / self.scale.scale)
        norm = float(global_norm(self.named.values()))
        if not math.isfinite(loss) or (not math.isfinite(norm) and self.scale is None):
            self._forget_gradients()
            raise NonFiniteError(f"step {step}: loss {loss}, gradient norm {norm}")
        if watch:
            watch({name: p.grad for name, p in self.named.items() if p.grad is not None})
        skipped = not math.isfinite(norm)
        self.before_update()
        if not skipped:
            self._update(step, norm)
        if self.scale:
            self.scale.update(overflow=skipped)
            metrics["loss_scale"] = self.scale.scale
        self._forget_gradients()
        return StepResult(loss, norm, tokens, skipped, metrics)

    def _accumulate(self, batch: Batch, step: int, tokens: int) -> tuple[float, dict[str, float]]:
        """Forward and backward over micro-batches; the mean loss over the global batch."""
        micros = [
            {k: v[i : i + self.rows] for k, v in batch.items()}
            for i in range(0, len(batch["slot"]), self.rows)
        ]
        weight = (self.scale.scale if self.scale else 1.0) / max(tokens, 1)
        if isinstance(self.call, DistributedDataParallel):
            weight *= self.world.layout.data  # DDP averages; the sum is wanted
        total: Tensor | float = 0.0
        sums: dict[str, Tensor] = {}
        for i, micro in enumerate(micros):
            with self._sync(last=i == len(micros) - 1):
                with self._autocast():
                    out = self.call(micro, Noise.at(self.job.train.seed, step, micro["slot"]))
                (out.total * weight).backward()
            total = total + out.total.detach()
            for name, value in out.metrics.items():
                sums[name] = sums.get(name, 0) + value.detach()
        reduced = self.world.sum(float(total), *(float(v) for v in sums.values()))
        loss, *rest = (value / max(tokens, 1) for value in reduced)
        return loss, dict(zip(sums, rest, strict=True))

    def _update(self, step: int, norm: float) -> None:
        clip = self.job.optimizer.clip
        if clip and norm > clip:
            scale_gradients_(self.named.values(), clip / norm)
        set_rate(self.optimizers, self._factor(step))
        for optimizer in self.optimizers:
            optimizer.step()

    def _factor(self, step: int) -> float:
        """The schedule's factor of the learning rate."""
        tokens_per_step = self.job.train.global_batch * self.job.data.seq_len
        return factor(step, self.job.schedule, self.job.train.steps, tokens_per_step)

    def learning_rate(self, step: int) -> float:
        """Learning rate of AdamW's parameters at a step."""
        return self.job.optimizer.lr * self._factor(step)

    # -- evaluation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> tuple[float, int]:
        """Summed loss and count of valid tokens over all ranks; all ranks call it together."""
        self.objective.eval()
        with self._autocast():
            out = self.objective(batch)
        self.objective.train()
        total, count = self.world.sum(float(out.total), self.objective.valid_tokens(batch))
        return total, int(count)

    # -- state ---------------------------------------------------------------------------------------------

    def state(self) -> State:
        """Weights and optimizer state under canonical names; the tensors are the live ones."""
        names = {id(p): n for n, p in self.named.items()}
        tensors = {name: p.detach() for name, p in self.named.items()}
        for optimizer in self.optimizers:
            for parameter, entries in optimizer.state.items():
                for key, value in entries.items():
                    tensors[f"optimizer.{names[id(parameter)]}.{key}"] = value
        return State(tensors, {"loss_scale": self.scale.state()} if self.scale else {})

    def load(self, state: State) -> None:
        if self.scale and "loss_scale" in state.numbers:
            self.scale.load(state.numbers["loss_scale"])

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

    def _forget_gradients(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None


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
