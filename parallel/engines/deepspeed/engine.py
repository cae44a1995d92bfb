"""The DeepSpeed engine: ZeRO over the data ranks of our model and plan, with our losses, schedules and clipping."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.apply import materialise, spread
from headway.parallel.checkpoint.fragments import Fragment
from headway.parallel.engines.base import FIRST_ITERATIONS, MUON, BaseEngine, persistent_buffers
from headway.parallel.engines.deepspeed import experts, start
from headway.parallel.engines.deepspeed.gathered import gather_in, keep_apart, spare_linears
from headway.parallel.engines.deepspeed.merge import configure, one_bit
from headway.parallel.engines.deepspeed.partition import partition
from headway.parallel.engines.deepspeed.ranks import Ranks
from headway.parallel.engines.deepspeed.settings import Json
from headway.parallel.engines.deepspeed.staged import between_reductions
from headway.parallel.engines.deepspeed.swapped import check_disk, flats_of, read_once
from headway.parallel.engines.deepspeed.ulysses import exchange_by_deepspeed
from headway.parallel.engines.totals import Totals
from headway.parallel.mesh import AXES, World
from headway.parallel.parts import is_part, part_of
from headway.parallel.pipeline.plan import make_plan
from headway.parallel.pipeline.run import Pipeline
from headway.parallel.tensor.power import iterate_parts
from headway.parallel.watch.ranks import alike
from headway.pretrain.config import Job
from headway.pretrain.engine import Batch, State
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import Objective
from headway.pretrain.optim.average import Average
from headway.pretrain.optim.build import build_one, set_rate
from headway.pretrain.optim.norms import square_sum
from headway.pretrain.optim.scaler import LossScale


class DeepSpeedEngine(BaseEngine):
    """See `headway.pretrain.engine.Engine`.

    DeepSpeed averages gradients over the data ranks, and the loss is weighed by their number beforehand, so that they
    are summed. The norm is taken here and gradients are clipped here, from ZeRO's own shards: DeepSpeed's norm is
    another where experts are spread, and of no use where a step must be refused before it is made.

    In bf16 and fp16 weights are narrow, as DeepSpeed's users expect, with fp32 masters and sums; but at stage 0 in
    bf16 they stay fp32. The forward runs under autocast, as native's does, so that norms and losses are computed in
    fp32.
    """

    def __init__(self, job: Job, objective: Objective, world: World, *, precision: str) -> None:
        super().__init__(job, objective, world, precision=precision)
        config = configure(job, world.layout, precision, world.device.type)
        package = start.load(world.device.type)
        check_disk(config["zero_optimization"], possible=start.has_async_io)
        start.join(package, world)
        self.ranks = Ranks(world)
        self.stage: int = config["zero_optimization"]["stage"]
        names = [name for name, _ in objective.named_parameters()]
        plan = make_plan(objective, job, world.layout) if world.layout.pipeline > 1 else None
        self.blank = copy.deepcopy(objective) if self.stage == 3 or plan else None
        spread(objective, job, world, precision=precision, plan=plan, plain=True)
        exchange_by_deepspeed(objective)
        host = replace(world, device=torch.device("cpu"))
        materialise(objective, job, host if self.stage == 3 else world)
        experts.mark(objective, world, self.ranks.alone)
        everything = dict(objective.named_parameters())
        self.named = {name: p for name, p in everything.items() if p.requires_grad}
        # Nobody trains these, and only an average has them in a checkpoint.
        self.frozen = {name: p.detach() for name, p in everything.items() if not p.requires_grad}
        self.shapes = {
            name: tuple(p.shape) for name, p in everything.items()
        }  # stage 3 changes what they say
        self.parts = {name: part_of(p) for name, p in everything.items()}
        self._mark_parts()
        masters = {name: p.data for name, p in self.named.items()}  # DeepSpeed would round them
        optimizer = build_one(self.named.items(), job.optimizer, MUON.get(precision), names)
        experts.regroup(optimizer, world)
        on_cpu = world.device.type == "cpu" or "offload_optimizer" in config["zero_optimization"]
        if self.stage > 0 and on_cpu and world.layout.tensor * world.layout.pipeline > 1:
            round_alike(optimizer)
        self._compute_under_autocast()
        theirs = one_bit(config)
        if self.stage == 3:
            partition(package, objective, handed(config), self.ranks, world.device)
        self.deepspeed = start.initialise(
            package,
            objective,
            None if theirs else optimizer,
            optimizer.param_groups,
            handed(config),
            self.ranks,
        )
        self.flats = flats_of(self.deepspeed, self.named)
        self.flats.allocate()
        self.scale = LossScale() if self.scaled else None  # in DeepSpeed's stead, for native's sequence
        if world.layout.tensor > 1:
            iterate_parts(objective, self.parts, world.group("tensor"))
        if self.stage == 3:
            gather_in(objective, package)
            spare_linears(objective)
            read_once(everything.values())
            keep_apart(self.deepspeed.optimizer.parameter_offload)
        if plan:
            self.pipeline = Pipeline(
                plan, objective, self.named, world, job.parallel.schedule, self.rows, self._autocast
            )
        self._write_masters(masters)
        self.weights_changed()

    # -- one step ------------------------------------------------------------------------------------------

    def _accumulate(self, batch: Batch, step: int, counts: dict[str, float]) -> Totals:
        weight = float(self.ranks.get_data_parallel_world_size())
        if self.pipeline:
            with between_reductions(self.deepspeed):
                return self._through_stages(self.pipeline, batch, step, counts, weight)
        sums, micros = Totals(self.world), self._micros(batch)
        if self.scale:
            self.flats.optimizer.override_loss_scale(self.scale.scale)
        for i, micro in enumerate(micros):
            self.deepspeed.set_gradient_accumulation_boundary(i == len(micros) - 1)
            out = self.deepspeed(micro, Noise.at(self.job.train.seed, step, micro["slot"]))
            self.deepspeed.backward(self._differentiated(out, counts, weight), scale_wrt_gas=False)
            sums.add(out)
        return sums

    @torch.no_grad()
    def _norm(self) -> float:
        squares = [
            square_sum([gradient])
            for name, gradient in self.flats.gradients().items()
            if gradient.numel() and self._answers_for(name)
        ]
        mine = float(torch.stack(squares).double().sum()) if squares else 0.0
        return float(self.world.sum(mine, along=AXES)[0] ** 0.5) / (self.scale.scale if self.scale else 1.0)

    def _update(self, step: int, norm: float) -> None:
        clip = self.job.optimizer.clip
        if clip and norm > clip:
            torch._foreach_mul_(list(self.flats.gradients().values()), clip / norm)
        set_rate([self.flats.inner], self._factor(step))
        self.deepspeed.step()
        self.flats.moved()

    def _settle(self, overflow: bool) -> dict[str, float]:
        if self.scale is None:
            return {}
        if overflow:
            self.deepspeed.step()  # sees it too, and leaves the step out
        self.scale.update(overflow=overflow)
        return {"loss_scale": self.scale.scale}

    def _forget_gradients(self) -> None:
        self.flats.forget()

    def _gradients(self) -> dict[str, Tensor]:
        return self.flats.gradients()

    def _answers_for(self, name: str) -> bool:
        """Whether this rank's run of a gradient counts in the norm: of those that several ranks hold, one does."""
        parameter = self.named[name]
        group = experts.copies_of(parameter) or self.ranks.get_data_parallel_group()
        if self.pipeline and self.pipeline.plan.holders[name][0] != self.world.place("pipeline"):
            return False  # another stage has the parameter too
        first = self.stage > 0 or group.rank() == 0
        cut = self.parts[name].shape != self.shapes[name]
        return first and (cut or self.world.place("tensor") == 0)

    # -- state ---------------------------------------------------------------------------------------------

    def state(self) -> State:
        tensors: dict[str, Any] = {name: self._fragment(name, self.flats.weight(name)) for name in self.named}
        tensors |= persistent_buffers(self.objective)
        if self.average:
            averages = self.average.state()
            tensors |= {f"ema.{name}": self._fragment(name, run) for name, run in averages.items()}
        for name in self.named:
            for key, value in self.flats.entries(name).items():
                run = value.view(-1) if self.flats.follows(name, value) else None
                tensors[f"optimizer.{name}.{key}"] = value if run is None else self._fragment(name, run)
        return State(tensors, {"loss_scale": self.scale.state()} if self.scale else {})

    def load(self, state: State) -> None:
        self.flats.refresh()
        if self.scale and "loss_scale" in state.numbers:
            self.scale.load(state.numbers["loss_scale"])

    def weights_changed(self) -> None:
        self.flats.refresh()
        self.objective.iterate(FIRST_ITERATIONS)
        if self.job.optimizer.ema:
            runs = [(name, self.flats.weight(name)) for name in self.named]
            runs += [(name, p.reshape(-1)) for name, p in self.frozen.items()]
            self.average = Average(runs, self.job.optimizer.ema, self.flats.refresh)

    def _fragment(self, name: str, run: Tensor) -> Fragment:
        """A run of a parameter's elements, with its place in the whole."""
        start = self.flats.runs[name].start if name in self.named else 0
        return Fragment(run, *self.parts[name], self.shapes[name], start, self._holders(name))

    def _holders(self, name: str) -> frozenset[int] | None:
        """Ranks that have the same run: without ZeRO, all replicas."""
        if self.stage > 0:
            return None
        if (experts_alike := experts.copies_of(self.named[name])) is not None:
            return frozenset(dist.get_process_group_ranks(experts_alike))
        cut = self.parts[name].shape != self.shapes[name]
        return alike(self.world.layout, self.world.rank, ("tensor",) if cut else ())

    # -- pieces --------------------------------------------------------------------------------------------

    def _mark_parts(self) -> None:
        """Tell DeepSpeed which parameters are parts along the tensor axis, and sum gradients that are shares."""
        for parameter in self.named.values():
            if is_part(parameter):
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
            if getattr(parameter, "tensor_share", False):
                parameter.register_hook(self._summed)

    def _summed(self, gradient: Tensor) -> Tensor:
        """The sum of the shares that the ranks of the tensor axis have of a gradient."""
        total = gradient.float().contiguous() if gradient.dtype != torch.float32 else gradient.clone()
        dist.all_reduce(total, group=self.world.group("tensor"))
        return total.to(gradient.dtype)

    def _compute_under_autocast(self) -> None:
        """DeepSpeed switches off an autocast around its own forward, so it is put inside."""
        if self.precision == "fp32":
            return
        forward = self.objective.forward

        @wraps(forward)
        def under_autocast(*args: Any, **kwargs: Any) -> Any:
            with self._autocast():
                return forward(*args, **kwargs)

        self.objective.forward = under_autocast  # type: ignore[method-assign]

    @torch.no_grad()
    def _write_masters(self, weights: dict[str, Tensor]) -> None:
        """Give the fp32 masters the initial weights as they were before DeepSpeed made narrow copies."""
        if self.precision == "fp32":
            return
        for name, weight in weights.items():
            run = self.flats.runs[name]
            self.flats.weight(name).copy_(weight.view(-1)[run.start : run.start + run.numel])


def round_alike(optimizer: torch.optim.Optimizer) -> None:
    """Let copies of a parameter, which lie at other places of the flat buffers of other ranks, move by the same bits.

    torch's fused AdamW for CPUs rounds an element by where it lies: in a vector, or among the last of its buffer.
    """
    optimizer.defaults["fused"] = False
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = False, True


def handed(config: Json) -> Json:
    """What DeepSpeed is given of a job's JSON: without what this engine does itself.

    It clips. It drives micro-batches, of which a growing batch has more and more. `train_batch_size` is left out
    because DeepSpeed takes ranks along the context axis for readers of other rows.
    """
    zero = config["zero_optimization"] | {
        "memory_efficient_linear": False
    }  # `gathered.spare_linears` is in its place
    if zero["stage"] in (1, 2) and "offload_optimizer" not in zero and "bf16" not in config:
        zero["compute_grad_norm"] = False
    rest = {key: value for key, value in config.items() if key != "train_batch_size"}
    return rest | {"gradient_clipping": 0.0, "zero_optimization": zero}
