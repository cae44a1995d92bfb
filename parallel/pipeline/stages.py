"""What a stage computes of a micro-batch: tensors of the stage before in, tensors for the next one (or the loss) out.

Between stages travel, each where it is needed: `stream`, what goes into the next block; `before`, what the tower
before gave (an encoder's output); `sides`, what blocks gave beside so far, as columns of one tensor [B, n].

Shapes: B rows of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from headway.parallel.pipeline.plan import Plan, Stage
from headway.pretrain.engine import Batch
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.routing import Side
from headway.pretrain.objectives import LossOutput, Mean, Objective
from headway.pretrain.objectives.base import ALL

SideShape = list[tuple[str, int]]
"""Names of what a use of a block gives beside, and numbers of a row; 0 for a number alone."""


class Towers(NamedTuple):
    """Hidden states of the last tower of a stage, with all sides of the stage, and what that tower was given."""

    hidden: Hidden
    before: Tensor | None


@dataclass
class Work:
    """What the stages of a rank are told of the step that is under way, and what its last stage found.

    Attributes:
        batches: micro-batches.
        noises: of each; None drops nothing.
        counts: what the terms of the loss are divided by; none where nothing is differentiated.
        weight: of the loss in what is differentiated.
        columns: of each micro-batch's sequences, those that are here; empty for all. See `Objective.forward`.
        share: what this rank's share is of the sums that the objective gives.
        found: of each micro-batch, the sums.
    """

    batches: list[Batch]
    noises: list[Noise | None]
    counts: dict[str, float] = field(default_factory=dict)
    weight: float = 1.0
    columns: list[Mapping[str, Columns]] = field(default_factory=list)
    share: Callable[[LossOutput], LossOutput] = lambda out: out
    found: dict[int, LossOutput] = field(default_factory=dict)


class StageModule(nn.Module):
    """One stage of an objective, of which this rank holds the parameters.

    Attributes:
        incoming: names of the tensors that it is given, in order.
        branches: whether a decoder begins here, whose first steps do not depend on what comes in.
        known: of the uses of blocks before it, what they give beside; told by the stage before.
    """

    def __init__(
        self, objective: Objective, plan: Plan, stage: Stage, autocast: Callable[[], AbstractContextManager]
    ) -> None:
        super().__init__()
        self.stage, self.autocast = stage, autocast
        self.view = view(objective, plan, stage)
        self.remembered = objective.remembered
        self.incoming = incoming(plan, stage, self.remembered)
        following = None if stage.last else plan.stages[stage.number + 1]
        self.outgoing = () if following is None else incoming(plan, following, self.remembered)
        self.branches = objective.remembered and any(
            tower and first == 0 for tower, (first, _) in stage.spans.items()
        )
        self.known: list[SideShape] = []
        self.own: list[SideShape] = []
        self.work: Work | None = None

    def forward(self, *received: Tensor, micro: int = 0) -> tuple[Tensor, ...] | Tensor:
        """Tensors for the next stage; of the last stage, what is differentiated, 0-dim.

        Args:
            received: what the stage before gave, in the order of `incoming`, then `sides` if there are any yet.
            micro: which micro-batch of the work.
        """
        assert self.work is not None
        batch, noise = self.work.batches[micro], self.work.noises[micro]
        columns = self.work.columns[micro] if self.work.columns else ALL
        given = dict(zip((*self.incoming, "sides"), received, strict=False))
        with self.autocast():
            hidden, before = self._towers(batch, noise, given, columns)
            self.own = [[(n, v[0].numel() if v.dim() > 1 else 0) for n, v in s.items()] for s in hidden.sides]
            if self.stage.last:
                sides = [*self._unpack(given.get("sides")), *hidden.sides]
                out = self.work.share(self.view.score(batch, hidden._replace(sides=sides), noise))
        if self.stage.last:
            return self._weighed(out, micro)
        made: dict[str, Any] = {
            "stream": hidden.final,
            "before": before if "stream" in self.outgoing else hidden.final,
        }
        sent = [_own_node(made[name], received) for name in self.outgoing]
        packed = self._pack(given.get("sides"), hidden.sides)
        return (*sent, *([] if packed is None else [_own_node(packed, received)]))

    def _towers(
        self, batch: Batch, noise: Noise | None, given: dict[str, Tensor], columns: Mapping[str, Columns]
    ) -> Towers:
        before, stream = given.get("before"), given.get("stream")
        hidden: Hidden | None = None
        sides: list[Side] = []
        for tower in sorted(self.stage.spans):
            before = before if hidden is None else hidden.final
            hidden = self.view.through(tower, batch, noise, before, stream, columns)
            stream = None
            sides += hidden.sides
        assert hidden is not None
        return Towers(hidden._replace(sides=sides), before)

    def _weighed(self, out: LossOutput, micro: int) -> Tensor:
        assert self.work is not None
        counts, weight = self.work.counts, self.work.weight
        terms = {name: total.detach() for name, total in out.terms.items()}
        self.work.found[micro] = LossOutput(terms, {n: Mean(*m) for n, m in out.metrics.items()})
        parts = [total * (weight / max(counts.get(name, 1), 1)) for name, total in out.terms.items()]
        return torch.stack(parts).sum() if len(parts) > 1 else parts[0]

    def _pack(self, packed: Tensor | None, sides: list[Side]) -> Tensor | None:
        """Sides so far and those of this stage, as columns; None if there are none."""
        columns = [value.reshape(len(value), -1) for side in sides for value in side.values()]
        columns = columns if packed is None else [packed, *columns]
        return torch.cat(columns, 1) if columns else None

    def _unpack(self, packed: Tensor | None) -> list[Side]:
        """The sides of the stages before, a use of a block each."""
        sides: list[Side] = []
        at = 0
        for shape in self.known:
            side: Side = {}
            for name, width in shape:
                assert packed is not None
                side[name] = packed[:, at : at + width] if width else packed[:, at]
                at += max(width, 1)
            sides.append(side)
        return sides


def incoming(plan: Plan, stage: Stage, remembered: bool) -> tuple[str, ...]:
    """Names of the tensors that a stage is given."""
    tower, use = stage.start
    if use == 0:
        return () if tower == 0 else ("before",)
    return ("stream", "before") if tower and remembered else ("stream",)


def view(objective: Objective, plan: Plan, stage: Stage) -> Objective:
    """The objective as one stage sees it: the same modules and parameters, but of each tower its own uses of blocks
    only, and no final norm or pooler before the end."""
    top = _shallow(objective)
    for number, path in enumerate(plan.towers):
        tower: nn.Module = top
        for name in path.split("."):
            child = tower._modules[name]
            assert child is not None
            tower._modules[name] = child = _shallow(child)
            tower = child
        blocks = _shallow(tower.get_submodule("blocks"))
        first, stop = stage.spans.get(number, (0, 0))
        blocks.span = first, stop
        tower._modules["blocks"] = blocks
        if stop < plan.uses[number]:
            tower._modules["norm"] = nn.Identity()
        if not stage.last and "pooler" in tower._modules:
            tower._modules["pooler"] = None
    return top


def _shallow(module: Any) -> Any:
    """The same module with its own table of children; not one of FSDP's, whose hooks belong to the original."""
    kind = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    twin: Any = object.__new__(kind)
    twin.__dict__.update(module.__dict__)
    twin._modules = dict(module._modules)
    return twin


def _own_node(tensor: Tensor, received: tuple[Tensor, ...]) -> Tensor:
    """The tensor, contiguous; a copy if it merely passes through: autograd wants outputs that are no inputs."""
    if any(tensor is one for one in received):
        return tensor.clone()
    return tensor.contiguous()
