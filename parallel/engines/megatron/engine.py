"""The Megatron-Core engine: our model and plan, its layers, data parallelism, optimizers and schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor, nn

from headway.parallel import expert
from headway.parallel.apply import materialise, spread
from headway.parallel.engines.base import AUTOCAST, FIRST_ITERATIONS, MUON, BaseEngine, persistent_buffers
from headway.parallel.engines.megatron import fragments, groups, optimizers, settings
from headway.parallel.engines.megatron.cpu import adapt
from headway.parallel.engines.megatron.experts import take_dispatchers
from headway.parallel.engines.megatron.guards import check_groups, check_shares, gather_whole
from headway.parallel.engines.megatron.marks import mark, narrow
from headway.parallel.engines.megatron.schedules import Gradients, MegatronPipeline
from headway.parallel.engines.megatron.swap import swap
from headway.parallel.engines.totals import Totals
from headway.parallel.mesh import World
from headway.parallel.parts import part_of
from headway.parallel.pipeline.plan import Plan, make_plan
from headway.parallel.tensor.power import iterate_parts
from headway.pretrain.config import Job
from headway.pretrain.engine import Batch, State, Sums
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import Objective
from headway.pretrain.optim.average import Average
from headway.pretrain.optim.build import set_rate
from headway.pretrain.optim.scaler import LossScale


class MegatronEngine(BaseEngine):
    """See `headway.pretrain.engine.Engine`.

    Parameters are whole on every data rank; `parallel.shard` and `parallel.replicate` are one group of data ranks, over
    which the distributed optimizer shards its state (ZeRO-1). In bf16 and fp16 what only products read is narrow
    (`marks.NARROW`), as autocast would make it; main parameters, gradients that are accumulated and moments are fp32.
    """

    def __init__(self, job: Job, objective: Objective, world: World, *, precision: str) -> None:
        super().__init__(job, objective, world, precision=precision)
        adapt()
        layout = world.layout
        self.groups = groups.start(world, job.parallel.timeout)
        plan = make_plan(objective, job, layout) if layout.pipeline > 1 else None
        names = [name for name, _ in objective.named_parameters()]
        self.blank = copy.deepcopy(objective) if plan else None
        spread(objective, job, world, precision=precision, plan=plan, plain=True)
        if layout.tensor > 1:
            swap(objective, settings.layers(job, layout), self.groups.tp, world.device.type)
            parts = {name: part_of(p) for name, p in objective.named_parameters()}
            iterate_parts(objective, parts, self.groups.tp)
        if layout.expert > 1:
            take_dispatchers(objective, world, self.groups, settings.dispatcher(job, layout))
        materialise(objective, job, world)
        self.named: Mapping[str, nn.Parameter] = dict(objective.named_parameters())
        spread_experts = expert.routed(objective) if layout.expert > 1 else set()
        mark(self.named, spread_experts, plan.holders if plan else None, world.place("pipeline"))
        self._buffer(job, names)
        self.scale = LossScale() if self.scaled else None
        if AUTOCAST.get(precision):
            for asked in ("logits", "attention_maps", "reconstruct"):
                if hasattr(objective, asked):
                    setattr(objective, asked, self._narrow(getattr(objective, asked)))
        if plan:
            self.pipeline = self._stages(plan)
        self.weights_changed()

    def _buffer(self, job: Job, names: list[str]) -> None:
        """Put parameters and gradients in Megatron's buffers, and its optimizers around them."""
        sharded = settings.shards(job, self.groups)
        exact = narrow(self.named, AUTOCAST.get(self.precision), job.model.spectral)
        self.data = DistributedDataParallel(
            settings.gradients(job, self.world.layout),
            settings.data_parallel(job, sharded=sharded),
            self.objective,
            pg_collection=self.groups,
        )
        trained = {name: p for name, p in self.named.items() if p.requires_grad}
        how = settings.optimizer(job, narrow=bool(AUTOCAST.get(self.precision)), sharded=sharded)
        self.optimizer = optimizers.build(
            trained, names, job.optimizer, how, [self.data], self.groups, MUON.get(self.precision)
        )
        self.pieces = fragments.pieces(self.optimizer, trained, fragments.Copies.among(self.groups))
        for name, values in exact.items():  # Megatron has made them from the narrow ones
            piece = self.pieces[name]
            piece.main.copy_(values.view(-1)[piece.start :][: len(piece.main)])
        check_shares(self.named, self.data.config)
        check_groups(group for each in self.optimizer.chained_optimizers for group in each.param_groups)
        self.gather, self.gathered = lambda: None, lambda: None
        if self.data.ddp_config.overlap_param_gather:
            self.gather, self.gathered = gather_whole(self.data)

    def _narrow(self, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method of the objective that is called beside training, under autocast: some weights are narrow."""

        def call(*args: Any, **settings: Any) -> Any:
            with self._autocast():
                return method(*args, **settings)

        return call

    def _stages(self, plan: Plan) -> MegatronPipeline:
        """The stages of this rank under Megatron's schedules."""
        gradients = Gradients(
            lambda p: p.main_grad,  # type: ignore[attr-defined]
            self.data.no_sync,
            self._reduce,
        )
        schedule = self.job.parallel.schedule
        return MegatronPipeline(
            plan, self.objective, self.named, self.world, schedule, self.rows, self._autocast, gradients
        )

    # -- one step ------------------------------------------------------------------------------------------

    def _accumulate(self, batch: Batch, step: int, counts: dict[str, float]) -> Totals:
        weight = self.scale.scale if self.scale else 1.0
        self.gathered()
        if self.pipeline:
            sums = self._through_stages(self.pipeline, batch, step, counts, weight)
        else:
            sums = self._accumulate_alone(batch, step, counts, weight)
            self._reduce()
        self.optimizer.prepare_grads()
        if self.scale:
            self._scale_gradients(1.0 / self.scale.scale)
        return sums

    def _accumulate_alone(self, batch: Batch, step: int, counts: dict[str, float], weight: float) -> Totals:
        """Forward and backward of all stages on this rank."""
        sums, micros = Totals(self.world), self._micros(batch)
        for i, micro in enumerate(micros):
            last = i == len(micros) - 1
            with nullcontext() if last else self.data.no_sync():
                with self._autocast():
                    out = self.data(micro, Noise.at(self.job.train.seed, step, micro["slot"]))
                self._differentiated(out, counts, weight).backward()
            sums.add(out)
        return sums

    def _reduce(self) -> None:
        """Sum gradients over data ranks, and shares over the tensor axis; wait for what is under way."""
        finalize_model_grads([self.data], pg_collection=self.groups)

    def _norm(self) -> Tensor | float:
        norm: float = self.optimizer.get_grad_norm()
        return norm

    def _update(self, step: int, norm: float) -> None:
        clip = self.job.optimizer.clip
        if clip and norm > clip:
            self._scale_gradients(clip / norm)
        set_rate((each.optimizer for each in self.optimizer.chained_optimizers), self._factor(step))
        self.optimizer.step_with_ready_grads()
        self.gather()

    @torch.no_grad()
    def _scale_gradients(self, factor: float) -> None:
        if parts := optimizers.gradients(self.optimizer):
            torch._foreach_mul_(parts, factor)

    def _settle(self, overflow: bool) -> dict[str, float]:
        if self.scale is None:
            return {}
        self.scale.update(overflow=overflow)
        return {"loss_scale": self.scale.scale}

    def _forget_gradients(self) -> None:
        self.optimizer.zero_grad()
        self.data.zero_grad_buffer()

    def _gradients(self) -> dict[str, Tensor]:
        return {}  # of a parameter no rank has all

    def evaluate(self, batch: Batch) -> Sums:
        self.gathered()
        return super().evaluate(batch)

    def whole(self) -> Objective | None:
        self.gathered()
        return super().whole()

    # -- state ---------------------------------------------------------------------------------------------

    def state(self) -> State:
        tensors = fragments.state(self.pieces, self.named) | persistent_buffers(self.objective)
        if self.average:
            runs = self.average.state()
            tensors |= {
                f"ema.{n}": fragments.fragment(run, self.pieces[n], self.named[n]) for n, run in runs.items()
            }
        return State(tensors, {"loss_scale": self.scale.state()} if self.scale else {})

    def load(self, state: State) -> None:
        self._refresh()
        if self.scale and "loss_scale" in state.numbers:
            self.scale.load(state.numbers["loss_scale"])

    def weights_changed(self) -> None:
        self._refresh()
        self.objective.iterate(FIRST_ITERATIONS)
        if self.job.optimizer.ema:
            mains = {name: piece.main for name, piece in self.pieces.items()}
            self.average = Average(mains.items(), self.job.optimizer.ema, self._refresh)

    def _refresh(self) -> None:
        """Bring the model's parameters up to the main ones; collective."""
        self.gathered()
        fragments.refresh(self.optimizer)
