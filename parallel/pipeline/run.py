"""Running a pipeline: torch's schedules over the stages of this rank, and a plain chain of forwards to evaluate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining._backward import stage_backward_weight

from headway.parallel.context.apply import slicer_of
from headway.parallel.mesh import World
from headway.parallel.pipeline.messages import Messages, Shapes
from headway.parallel.pipeline.plan import Plan, tensors_of
from headway.parallel.pipeline.shared import Shared
from headway.parallel.pipeline.stages import StageModule, Work
from headway.pretrain.engine import Batch
from headway.pretrain.models.layers import Noise
from headway.pretrain.objectives import LossOutput, Mean, Objective
from headway.pretrain.objectives.distill import names
from headway.pretrain.optim.clipping import global_norm

TORCH = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved_1f1b": schedules.ScheduleInterleaved1F1B,
    "interleaved_zero_bubble": schedules.ScheduleInterleavedZeroBubble,
    "zbv": schedules.ScheduleZBVZeroBubble,
    "dualpipev": schedules.ScheduleDualPipeV,
}

Sums = tuple[dict[str, Tensor], dict[str, Mean]]


class SplitBackward(PipelineStage):
    """A stage whose gradients of weights may come after those of activations.

    torch computes weights' gradients group by group and frees the graph with each. Groups can share parts of it (layers
    with biases after one norm), so here it is kept until the last group is done; it goes with the micro-batch.
    """

    def backward_maybe_with_nosync(
        self, backward_type: str, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        if backward_type != "weight":
            gradients, groups = super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
            # What is sent must be contiguous, and torch sends gradients as they come.
            return tuple(g if g is None else g.contiguous() for g in gradients), groups
        return stage_backward_weight(
            self.submod.parameters(), bwd_kwargs["param_groups"], retain_graph=True
        ), None


class WholeBackward(SplitBackward):
    """A stage whose backward is not split: weights' gradients come with those of activations.

    torch splits by groups of weights whose graphs meet where the stage's input comes in. A branch that joins late (what
    a decoder does before it first looks at the encoder) gives groups that share parts of the graph, and some gradients
    come out wrong: T5 under zbv, its five blocks on four stages, leaves the curve by 1e-5.
    """

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        super().backward_one_chunk(bwd_chunk_id, loss=loss, full_backward=True, last_backward=last_backward)

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None: ...


class Pipeline:
    """The stages of this rank, and how the ranks of a pipeline work through a batch together.

    All ranks of a pipeline have the same rows (and columns of them): each stage reads its own copy of the batch, and
    only what blocks compute travels. Under FSDP, parameters are gathered once a step and gradients reduced after the
    last micro-batch.

    Args:
        plan: how the objective was cut.
        objective: this rank's part of it, materialised and sharded.
        named: its parameters.
        world: this process among the ranks.
        schedule: of the job.
        rows: of a micro-batch.
        autocast: the context of a forward.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        named: Mapping[str, Tensor],
        world: World,
        schedule: str,
        rows: int,
        autocast: Callable[[], AbstractContextManager],
    ) -> None:
        self.plan, self.objective, self.named, self.world = plan, objective, named, world
        self.schedule, self.rows = schedule, rows
        self.place = world.place("pipeline")
        self.stages = [StageModule(objective, plan, s, autocast) for s in plan.at(self.place)]
        self.messages = Messages(world.group("pipeline"), world.device)
        self.shared = Shared(plan.holders, world)
        self.slicer = slicer_of(objective, world) if world.layout.context > 1 else None
        self.shapes: dict[Any, list[Shapes]] = {}
        self.schedules: dict[Any, Any] = {}
        self.names: dict[str, Any] = {}

    # -- a step --------------------------------------------------------------------------------------------

    def train(
        self,
        micros: list[Batch],
        seed: int,
        step: int,
        counts: dict[str, float],
        weight: float,
        kind: str = "",
    ) -> list[LossOutput]:
        """Forward and backward of micro-batches; gradients are whole afterwards, but for clipping.

        Args:
            kind: names what the batches hold and the loss is made of, equal on all ranks.

        Returns: sums of each micro-batch, on the rank of the last stage; nothing elsewhere.
        """
        noises: list[Noise | None] = [Noise.at(seed, step, micro["slot"]) for micro in micros]
        with self._gathered(reduce=True):
            shapes = self._shapes(micros[0], kind)
            work = self._give(self._work(micros, noises, counts, weight))
            self._run(len(micros), rows_of(micros[0]), shapes, kind)
        self._give(None)
        self._add_shared()
        return [work.found[i] for i in sorted(work.found)]

    def _run(self, count: int, rows: int, shapes: list[Shapes], kind: str) -> None:
        """Forward and backward of so many micro-batches of so many rows, by the job's schedule."""
        schedule = self._schedule(count, rows, shapes, kind)
        for stage in getattr(schedule, "_stages", None) or [schedule._stage]:
            stage.has_backward = True
            stage.clear_runtime_states()
        each: list[Any] = [None] * count
        schedule._step_microbatches(
            [()] * count, [{"micro": i} for i in range(count)], each, return_outputs=False
        )

    def _add_shared(self) -> None:
        """Add up what the copies of parameters along the pipeline have for a gradient."""
        self.shared.add_gradients(self.named)

    def norm(self) -> float:
        """L2 norm of the gradient of the whole model, before or after clipping; equal on all ranks."""
        mine = float(global_norm(self.shared.owned(self.named)))
        return float(self.world.sum(mine * mine, along=("pipeline",))[0] ** 0.5)

    def _schedule(self, count: int, rows: int, shapes: list[Shapes], kind: str) -> Any:
        """torch's schedule over this rank's stages, for so many micro-batches of so many rows. Ranks make a new one
        together: its stages greet each other."""
        key = (kind, count, rows, *shapes)
        if key not in self.schedules:
            built = []
            for module, around in zip(self.stages, shapes, strict=True):
                stage = (WholeBackward if module.branches else SplitBackward)(
                    module,
                    module.stage.number,
                    len(self.plan.stages),
                    self.world.device,
                    input_args=around.examples("into", rows),
                    output_args=around.examples("out", rows) or self._loss_example(),
                    group=self.world.group("pipeline"),
                )
                built.append(stage)
            order: Any = TORCH[self.schedule]
            single = issubclass(order, schedules.PipelineScheduleSingle)
            self.schedules[key] = order(
                built[0] if single else built, count, loss_fn=lambda loss, _: loss, scale_grads=False
            )
        return self.schedules[key]

    def _loss_example(self) -> Tensor:
        """What the last stage gives: torch 2.11 looks at its dtype."""
        dtype = next(iter(self.named.values())).dtype
        return torch.empty((), dtype=dtype, device="meta", requires_grad=True)

    # -- evaluation ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, micros: list[Batch], kind: str = "") -> list[LossOutput]:
        """Forward of micro-batches without noise; sums on the rank of the last stage, nothing elsewhere."""
        with self._gathered(reduce=False):
            shapes = self._shapes(micros[0], kind)
            work = self._give(self._work(micros, [None] * len(micros)))
            kept: dict[tuple[int, int], Any] = {}
            for module, around in zip(self.stages, shapes, strict=True):
                number = module.stage.number
                for i, micro in enumerate(micros):
                    received = kept.pop((number, i), None)
                    if received is None and number:
                        received = self.messages.receive(
                            around.examples("into", rows_of(micro)), self._rank(number - 1)
                        )
                    made = module(*(received or ()), micro=i)
                    if module.stage.last:
                        continue
                    if self.plan.places[number + 1] == self.place:
                        kept[number + 1, i] = made
                    else:
                        self.messages.send(made, self._rank(number + 1))
            self.messages.wait()
        self._give(None)
        return [work.found[i] for i in sorted(work.found)]

    # -- what all ranks are told ---------------------------------------------------------------------------

    def tell(self, kind: str, terms: dict[str, Tensor], metrics: dict[str, Mean]) -> Sums:
        """What the last stage has summed, on all ranks of the pipeline.

        Args:
            kind: calls of one kind have the same names.
            terms: as the last stage has them; empty elsewhere.
            metrics: as the last stage has them; empty elsewhere.
        """
        source = self._rank(len(self.plan.stages) - 1)
        if kind not in self.names:
            shapes = [[n, list(m.sum.shape)] for n, m in metrics.items()]
            self.names[kind] = self.messages.broadcast({"terms": [*terms], "metrics": shapes}, source)
        names, shapes = self.names[kind]["terms"], self.names[kind]["metrics"]
        pieces = [*terms.values(), *(piece for mean in metrics.values() for piece in mean)]
        sizes = [1] * len(names) + [n for _, shape in shapes for n in (torch.Size(shape).numel(), 1)]
        flat = torch.zeros(sum(sizes), dtype=torch.float64, device=self.world.device)
        if pieces:
            flat = torch.cat([piece.detach().reshape(-1).double() for piece in pieces])
        dist.broadcast(flat, source, group=self.world.group("pipeline"))
        parts = iter(flat.split(sizes))
        told = {name: next(parts).reshape(()) for name in names}
        return told, {
            name: Mean(next(parts).reshape(shape), next(parts).reshape(())) for name, shape in shapes
        }

    def loads(self, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """Metrics without the loads of experts that other ranks hold."""
        mine = set()
        begin = 0
        for tower, (prefix, uses) in enumerate(zip(self.plan.towers, self.plan.uses, strict=True)):
            held = self.objective.get_submodule(f"{prefix}.blocks")._modules
            mine |= {begin + use for use in range(uses) if str(use // self.plan.repeats[tower]) in held}
            begin += uses
        return {n: v for n, v in metrics.items() if not n.startswith("load/") or int(n.split("/")[1]) in mine}

    def elsewhere(self) -> dict[str, Tensor]:
        """Parameters and buffers of other ranks of the pipeline, on the meta device: what is written there is lost."""
        held = self.plan.holders
        return {name: t for name, t in tensors_of(self.plan.whole).items() if self.place not in held[name]}

    # -- pieces --------------------------------------------------------------------------------------------

    def cut(self, batch: Batch) -> list[Batch]:
        """A batch in micro-batches."""
        count = rows_of(batch)
        return [{k: v[i : i + self.rows] for k, v in batch.items()} for i in range(0, count, self.rows)]

    def _work(
        self,
        micros: list[Batch],
        noises: list[Noise | None],
        counts: dict[str, float] | None = None,
        weight: float = 1.0,
    ) -> Work:
        """What stages are told, of this rank's columns where sequences are cut."""
        if self.slicer is None:
            return Work(micros, noises, counts or {}, weight)
        here = [self.slicer.before(self.objective, (micro,)) for micro in micros]
        batches, columns = [batch for batch, *_ in here], [columns for *_, columns in here]
        return Work(batches, noises, counts or {}, weight, columns, self.slicer.shared)

    def _rank(self, stage: int) -> int:
        """Global rank of the holder of a stage."""
        return dist.get_global_rank(self.world.group("pipeline"), self.plan.places[stage])

    def _give(self, work: Any) -> Any:
        for module in self.stages:
            module.work = work
        return work

    def _shapes(self, micro: Batch, kind: str) -> list[Shapes]:
        """What goes into and out of this rank's stages, for batches like this one."""
        # Stages are taught different things: `kind` speaks for that, so that all ranks explore, or none.
        own = sorted((name, value) for name, value in micro.items() if not name.startswith(names.PREFIX))
        key = (kind, *((name, tuple(value.shape[1:]), value.dtype) for name, value in own))
        if key not in self.shapes:
            self._give(self._work([{name: value[:1] for name, value in micro.items()}], [None]))
            with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
                self.shapes[key] = self._explore()
        for module, around in zip(self.stages, self.shapes[key], strict=True):
            module.known = around.sides
        return self.shapes[key]

    def _explore(self) -> list[Shapes]:
        """Send one row down the pipeline to see the shapes of what travels; its values mean nothing."""
        found: list[Shapes] = []
        told: dict[str, Any] | None = None
        for module in self.stages:
            number = module.stage.number
            if number and (told is None or self.plan.places[number - 1] != self.place):
                told = self.messages.receive_text(self._rank(number - 1))
            around = Shapes.of(told)
            if not module.stage.last:
                made = module(*around.zeros(self.world.device))
                assert isinstance(made, tuple)
                around.put_out(made)
                told = around.text(module.own)
                if self.plan.places[number + 1] != self.place:
                    self.messages.send_text(told, self._rank(number + 1))
            found.append(around)
        return found

    @contextmanager
    def _gathered(self, *, reduce: bool) -> Iterator[None]:
        """Parameters that FSDP has sharded are whole within; after it gradients are reduced, if they are wanted."""
        root = self.objective
        if not isinstance(root, FSDPModule):
            yield
            return
        state = root._get_fsdp_state()
        state._lazy_init()  # before any block runs, or it would take itself for the root
        shards = [module for module in root.modules() if isinstance(module, FSDPModule)]
        root.set_is_last_backward(False)
        root.set_reshard_after_backward(False)
        root.set_requires_gradient_sync(False)
        for module in shards:
            module.unshard()
        yield
        if reduce:  # as torch's own stages do it
            root.set_is_last_backward(True)
            root.set_reshard_after_backward(True)
            root.set_requires_gradient_sync(True)
            for each in state._state_ctx.all_states:
                # torch 2.11 has at most one group a module
                groups = getattr(each, "_fsdp_param_groups", None) or [each._fsdp_param_group]
                for group in filter(None, groups):
                    group.post_backward()
            state._root_post_backward_final_callback()
        for module in shards:
            module.reshard()


def rows_of(batch: Batch) -> int:
    """Rows of a batch: the first dim of any of its tensors."""
    return len(next(iter(batch.values())))
