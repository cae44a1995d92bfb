"""The native engine: DDP, FSDP2 and HSDP by torch alone. Default, and the reference for the others."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from headway.parallel.apply import apply
from headway.parallel.engines.base import FIRST_ITERATIONS, MUON, BaseEngine, persistent_buffers
from headway.parallel.engines.totals import Totals
from headway.parallel.mesh import World
from headway.parallel.pipeline.plan import make_plan
from headway.pretrain.config import Job
from headway.pretrain.engine import Batch, State
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import Objective
from headway.pretrain.optim.average import Average
from headway.pretrain.optim.build import allocate_state, build_optimizers, set_rate
from headway.pretrain.optim.clipping import global_norm, scale_gradients_
from headway.pretrain.optim.scaler import LossScale
from headway.pretrain.optim.sharded import reduced


class NativeEngine(BaseEngine):
    """See `headway.pretrain.engine.Engine`.

    Weights, moments and reductions are fp32 (fp64 for fp64); bf16 and fp16 are autocast around the forward; fp8 is
    bf16 with other products in blocks.
    """

    def __init__(
        self, job: Job, objective: Objective, world: World, *, precision: str, compiled: bool
    ) -> None:
        super().__init__(job, objective, world, precision=precision)
        plan = make_plan(objective, job, world.layout) if world.layout.pipeline > 1 else None
        names = [name for name, _ in objective.named_parameters()]
        self.call = apply(objective, job, world, precision=precision, compiled=compiled, plan=plan)
        self.named = dict(objective.named_parameters())
        self.optimizers = build_optimizers(self.named.items(), job.optimizer, MUON.get(precision), names)
        self.scale = LossScale() if self.scaled else None
        if plan:
            from headway.parallel.pipeline.run import Pipeline

            schedule = job.parallel.schedule
            self.pipeline = Pipeline(plan, objective, self.named, world, schedule, self.rows, self._autocast)
        self.weights_changed()
        for optimizer in self.optimizers:
            allocate_state(optimizer)

    # -- one step ------------------------------------------------------------------------------------------

    def _accumulate(self, batch: Batch, step: int, counts: dict[str, float]) -> Totals:
        weight = self.scale.scale if self.scale else 1.0
        if self.pipeline:
            sums = self._through_stages(self.pipeline, batch, step, counts, weight)
        else:
            sums = self._accumulate_alone(batch, step, counts, weight)
        self._reduce(step)
        if self.scale:
            scale_gradients_(self.named.values(), 1.0 / self.scale.scale)
        return sums

    def _accumulate_alone(self, batch: Batch, step: int, counts: dict[str, float], weight: float) -> Totals:
        """Forward and backward of all stages on this rank."""
        sums, micros = Totals(self.world), self._micros(batch)
        if isinstance(self.call, DistributedDataParallel):
            weight *= self.world.layout.data  # DDP averages; the sum is wanted
        for i, micro in enumerate(self._taught(micros, step)):
            with self._sync(last=i == len(micros) - 1):
                with self._autocast():
                    out = self.call(micro, Noise.at(self.job.train.seed, step, micro["slot"]))
                self._differentiated(out, counts, weight).backward()
            sums.add(out)
        return sums

    def _reduce(self, step: int) -> None:
        """Carry out what is still to be summed of gradients, but for parameters that rest, which take none."""
        for name, parameter in self.named.items():
            if self._frozen(name, step):
                parameter.grad = None
        gradients = self._gradients()
        for name, gradient in zip(gradients, reduced(gradients.values()), strict=True):
            self.named[name].grad = gradient

    def _frozen(self, name: str, step: int) -> bool:
        """Whether a parameter rests at a step."""
        distillation = self.objective.distillation
        return distillation is not None and distillation.frozen(name, step)

    def _norm(self) -> Tensor | float:
        return self.pipeline.norm() if self.pipeline else global_norm(self.named.values())

    def _update(self, step: int, norm: float) -> None:
        clip = self.job.optimizer.clip
        if clip and norm > clip:
            scale_gradients_(self.named.values(), clip / norm)
        set_rate(self.optimizers, self._factor(step))
        for optimizer in self.optimizers:
            optimizer.step()

    def _settle(self, overflow: bool) -> dict[str, float]:
        if self.scale is None:
            return {}
        self.scale.update(overflow=overflow)
        return {"loss_scale": self.scale.scale}

    # -- state ---------------------------------------------------------------------------------------------

    def state(self) -> State:
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

    def load(self, state: State) -> None:
        if self.scale and "loss_scale" in state.numbers:
            self.scale.load(state.numbers["loss_scale"])

    def weights_changed(self) -> None:
        self.objective.iterate(FIRST_ITERATIONS)
        if self.job.optimizer.ema:
            self.average = Average(self.named.items(), self.job.optimizer.ema, self._forget_gathered)

    # -- pieces --------------------------------------------------------------------------------------------

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
