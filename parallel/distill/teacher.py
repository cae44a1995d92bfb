"""A teacher beside a run: it reads the run's batches and gives what the student is compared with, at the student's
layout.

The teacher's layout is its own. Rows of a micro-batch are dealt to the teacher's data ranks, tensors come back to the
ranks whose rows, columns, heads and stages they are about; see `routes`.

Shapes: B batch, E hidden size, N samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.distill.holdings import data_rank
from headway.parallel.distill.redistribute import Item
from headway.parallel.distill.routes import Routes
from headway.parallel.distill.teaching import Teaching
from headway.parallel.mesh import World
from headway.pretrain.config import Model
from headway.pretrain.engine import Batch
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.distillation import Wanted

READS = ("tokens", "documents", "segments", "prefix", "targets", "target_documents", "pixels", "slot")
"""What a model reads of a batch."""


class Teacher(Protocol):
    """Who gives what a student is compared with."""

    def teach(self, micros: Sequence[Batch], step: int | None) -> Iterator[Batch]:
        """What belongs into each micro-batch beside its own, in order. Collective; step None is an evaluation."""

    def signature(self, step: int | None) -> str:
        """What tensors there are at a step, of all ranks: equal where they are."""


class LiveTeacher:
    """A model that computes when it is asked, on the student's ranks."""

    def __init__(
        self,
        teaching: Teaching,
        routes: Routes,
        world: World,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """
        Args:
            teaching: the teacher, spread as `routes` say.
            routes: between it and the student.
            world: of the student.
        """
        self.teaching, self.routes, self.world, self.autocast = teaching, routes, world, autocast

    @property
    def model(self) -> Model:
        """Its shape."""
        return self.routes.model

    def signature(self, step: int | None) -> str:
        return str(self.routes.distillation.wanted(step))

    def attention_maps(self, batch: Batch) -> Tensor:
        """The teacher's weights of every layer that has some and of every head, whole on every rank, [layers, B, H, S,
        S]. Collective; the batch is the same everywhere."""
        with self.autocast():
            return self.teaching.attention_maps(batch)

    def teach(self, micros: Sequence[Batch], step: int | None) -> Iterator[Batch]:
        wanted = self.routes.distillation.wanted(step)
        sizes = [sizes_of(micro, step, self.routes, self.world) for micro in micros]
        answers = (self._answer(m, wanted, rows) for m, rows in zip(micros, sizes, strict=True))
        return with_others(answers, micros, sizes, self.routes) if wanted.others else answers

    def give(self, micro: Batch, wanted: Wanted) -> Batch:
        """What this rank's seat is about of a micro-batch, of which all ranks have as many rows; representations are
        those of its rows alone. Collective."""
        return self._answer(micro, wanted, [len(micro["key"])] * self.routes.seats.layout.data)

    @torch.no_grad()
    def _answer(self, micro: Batch, wanted: Wanted, sizes: list[int]) -> Batch:
        path = self.routes.inputs(sizes)
        items = [Item(micro[name], path) for name in READS if name in micro]
        given = dict(zip((n for n in READS if n in micro), self.routes.exchange(items), strict=True))
        found = compute(self.teaching, given, wanted, self.routes.mine(sizes), self.autocast)
        return delivered(self.routes, found, wanted, sizes)


def compute(
    teaching: Teaching,
    given: dict[str, Tensor | None],
    wanted: Wanted,
    rows: int,
    autocast: Callable[[], AbstractContextManager],
) -> Batch:
    """What a teacher makes of the rows that it was given, of which the first are its own."""
    with torch.no_grad(), autocast():
        found = teaching({name: x for name, x in given.items() if x is not None}, wanted)
    return {name: x[:rows] for name, x in found.items()}


def delivered(routes: Routes, found: Batch, wanted: Wanted, sizes: list[int]) -> Batch:
    """What this rank of the student is compared with. Collective."""
    got = routes.exchange(routes.outputs(found, wanted, sizes))
    return {name: x for name, x in zip(found, got, strict=True) if x is not None}


def sizes_of(micro: Batch, step: int | None, routes: Routes, world: World) -> list[int]:
    """Rows of every data rank of the student; equal in training, and perhaps not in an evaluation."""
    layout, mine = routes.seats.layout, len(next(iter(micro.values())))
    if step is not None or layout.data == 1:
        return [mine] * layout.data
    counts = torch.zeros(layout.data, dtype=torch.int64, device=world.device)
    place = routes.seats.places[world.rank]
    if (place.pipeline, place.context, place.tensor) == (0, 0, 0):
        counts[data_rank(place, layout)] = mine
    dist.all_reduce(counts, group=world.everyone)
    return counts.tolist()


def with_others(
    answers: Iterator[Batch], micros: Sequence[Batch], sizes: Sequence[list[int]], routes: Routes
) -> Iterator[Batch]:
    """The answers, each with the representations of the whole global batch, [B, N, E], in its order; only on ranks
    whose stages want them."""
    found = list(answers)
    items = [Item(micro["slot"], routes.slots(rows)) for micro, rows in zip(micros, sizes, strict=True)]
    slots = [routes.exchange([item])[0] for item in items]
    means = [answer.pop(names.OTHERS) for answer in found if names.OTHERS in answer]
    if not means:
        return iter(found)
    order = torch.cat([x for x in slots if x is not None]).argsort()
    others = torch.cat(means)[order].unsqueeze(0)
    pairs = zip(found, micros, strict=True)
    return (answer | {names.OTHERS: others.expand(len(micro["slot"]), -1, -1)} for answer, micro in pairs)
