"""Megatron-Core's pipeline schedules over our stages: 1F1B, and interleaved 1F1B.

Megatron's schedules send one tensor of one size from stage to stage, call `forward_step_func` for a chunk of the model
and differentiate what it returns. Here a chunk is a `StageModule`, and what it gives and takes is packed (`wire`).
Losses are summed, never averaged: each is divided by the global count already, so `calculate_per_token_loss` is on and
no number of tokens is told. Reduction over the data axes is the engine's, after the last micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from headway.parallel.engines.megatron.guards import exact
from headway.parallel.engines.megatron.wire import WORD, Ledger, Receive, Send, Wire
from headway.parallel.mesh import World
from headway.parallel.pipeline.messages import Shapes
from headway.parallel.pipeline.plan import Plan
from headway.parallel.pipeline.run import Pipeline
from headway.parallel.pipeline.stages import StageModule
from headway.pretrain.objectives import Objective
from headway.pretrain.optim.norms import square_sum

SCHEDULES = ("1f1b", "interleaved_1f1b")
"""Values of `parallel.schedule` that Megatron has."""


@dataclass(frozen=True)
class Gradients:
    """Where gradients are, and how they become whole along the data axes.

    Attributes:
        of: a parameter's gradient, to be added to and read in place. Megatron's DDP keeps it in `main_grad`.
        no_sync: within, a backward starts no reduction.
        finish: reduces what is left to reduce; called once, after the last backward.
    """

    of: Callable[[Tensor], Tensor]
    no_sync: Callable[[], AbstractContextManager[Any]] = nullcontext
    finish: Callable[[], None] = lambda: None


def plain(parameter: Tensor) -> Tensor:
    """The gradient that autograd gives, zeros where there is none: of parameters outside of any DDP."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


class MegatronPipeline(Pipeline):
    """`Pipeline` with Megatron's schedules.

    `parallel_state` has been initialised with the sizes of the layout. Parameters that several ranks of the pipeline
    hold (`copied`) must be marked `shared_embedding = True` before Megatron's DDP sees them if its optimizer is the
    distributed one: a bucket of their own is then cut alike at all holders, and copies can be added shard by shard.

    Args:
        gradients: see there; without it, autograd's, and no data axes.
    """

    def __init__(
        self,
        plan: Plan,
        objective: Objective,
        named: Mapping[str, Tensor],
        world: World,
        schedule: str,
        rows: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        gradients: Gradients | None = None,
    ) -> None:
        assert schedule in SCHEDULES, schedule
        super().__init__(plan, objective, named, world, schedule, rows, autocast)
        self.gradients = gradients or Gradients(plain)
        self.ledger = Ledger()

    def norm(self) -> float:
        """L2 norm of the gradient of the whole model, where every rank has whole gradients and whole parameters."""
        parts = [self.gradients.of(p) for p in self.shared.owned(self.named) if p.requires_grad]
        mine = float(square_sum(parts)) if parts else 0.0
        return float(self.world.sum(mine, along=("pipeline",))[0] ** 0.5)

    def _run(self, count: int, rows: int, shapes: list[Shapes], kind: str) -> None:
        chunks, config, sizes = self._schedule(count, rows, shapes, kind)
        interleaved = len(chunks) > 1
        shaped = {} if interleaved else {"adjust_tensor_shapes_fn": lambda *_: sizes}
        micros: list[Iterator[int]] = [iter(range(count)) for _ in chunks]
        run = get_forward_backward_func(self.world.layout.pipeline, len(chunks) if interleaved else None)
        run(
            forward_step_func=_forward,
            data_iterator=micros,
            model=chunks,
            num_microbatches=count,
            seq_length=max(shape[0] for side in sizes for shape in side)
            * parallel_state.get_context_parallel_world_size(),
            micro_batch_size=1,
            **shaped,
        )
        self.ledger.check()
        self.gradients.finish()

    def _add_shared(self) -> None:
        self.shared.add({name: self.gradients.of(self.named[name]) for name in self.shared.copied(self.named)})

    def _schedule(self, count: int, rows: int, shapes: list[Shapes], kind: str) -> Any:
        """Chunks, their configuration, and sizes of what is received and sent; the same for batches that are alike."""
        key = (kind, count, rows, *shapes)
        if key not in self.schedules:
            wires = [
                (Wire.of(s.stage.number, a.examples("into", rows)), Wire.of(s.stage.number + 1, a.examples("out", rows)))
                for s, a in zip(self.stages, shapes, strict=True)
            ]
            if len(self.stages) == 1:
                sizes = [wire.words for wire in wires[0]]
            else:  # one size for all boundaries
                sizes = [self._largest(max(wire.words for pair in wires for wire in pair))] * 2
            config = self._config(count)
            chunks = [
                Chunk(stage, pair, sizes[1], self.ledger, config)
                for stage, pair in zip(self.stages, wires, strict=True)
            ]
            self.schedules[key] = chunks, config, tuple([(size, 1, 1)] for size in sizes)
        return self.schedules[key]

    def _config(self, count: int) -> TransformerConfig:
        """What the schedules ask of a model's configuration; layers and heads are not looked at."""
        ranks, virtual = self.world.layout.pipeline, len(self.stages)
        several: dict[str, Any] = {}
        if virtual > 1:
            several = {
                "virtual_pipeline_model_parallel_size": virtual,
                # Rounds of as many micro-batches as there are ranks, or a few more, as in `rules.legal`.
                "microbatch_group_size_per_vp_stage": count // (count // ranks),
            }
        return exact(
            num_layers=ranks * virtual,
            num_attention_heads=1,
            hidden_size=1,
            pipeline_model_parallel_size=ranks,
            pipeline_dtype=WORD,
            no_sync_func=self.gradients.no_sync,
            # gloo still reads what was sent when its memory would be given back.
            deallocate_pipeline_outputs=self.world.device.type == "cuda",
            **several,
        )

    def _largest(self, words: int) -> int:
        """The largest such number on any rank of the pipeline."""
        most = torch.tensor(words, device=self.world.device)
        dist.all_reduce(most, dist.ReduceOp.MAX, self.world.group("pipeline"))
        return int(most)


class Chunk(nn.Module):
    """A stage in Megatron's protocol.

    Args:
        stage: what is computed.
        wires: of what comes in and what goes out.
        words: of a message that goes out.
        ledger: of messages.
        config: of the schedule.
    """

    model_type = ModelType.encoder_or_decoder

    def __init__(
        self,
        stage: StageModule,
        wires: tuple[Wire, Wire],
        words: int,
        ledger: Ledger,
        config: TransformerConfig,
    ) -> None:
        super().__init__()
        self.stage, self.words, self.ledger, self.config = stage, words, ledger, config
        self.into, self.out = wires
        self.message: Tensor | None = None

    def set_input_tensor(self, messages: list[Tensor | None]) -> None:
        """What the stage before sent; None for the first stage."""
        (self.message,) = messages

    def forward(self, micro: int) -> Tensor:
        """A message for the next stage; of the last stage, what is differentiated."""
        received: tuple[Tensor, ...] = ()
        if self.message is not None:
            received = Receive.apply(self.into, micro, self.ledger, self.message)
            self.message = None
        made = self.stage(*received, micro=micro)
        if isinstance(made, Tensor):
            return made
        return Send.apply(self.out, self.words, micro, self.ledger, *made)


def _forward(micros: Iterator[int], chunk: Chunk) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Megatron's `forward_step_func`."""
    return chunk(next(micros)), _loss


def _loss(loss: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Megatron's `loss_func`: no tokens, so that nothing is divided by their number. The sums are in `Work.found`."""
    return loss, torch.zeros((), dtype=torch.int), {}
