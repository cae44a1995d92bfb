"""A teacher beside a run: it reads the run's batches and gives what the student is compared with, at the student's
layout.

The teacher's layout is its own. Rows of a micro-batch are dealt to the teacher's data ranks, tensors come back to the
ranks whose rows, columns, heads and stages they are about; see `redistribute`.

Shapes: B batch, S sequence, H heads, D their width, E hidden size, R distances, N samples of the global batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.distill.holdings import (
    Holding,
    columns_of,
    data_rank,
    even,
    places,
    row_ranges,
    share,
)
from headway.parallel.distill.redistribute import Item, Route, exchange, route
from headway.parallel.distill.student import Rows, Seats
from headway.parallel.distill.teaching import Teaching
from headway.parallel.mesh import World
from headway.pretrain.config import Model
from headway.pretrain.engine import Batch
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.distillation import Distillation, Wanted
from headway.pretrain.objectives.distill.names import Target

READS = ("tokens", "documents", "segments", "prefix", "targets", "target_documents", "pixels", "slot")
"""What a model reads of a batch."""


class Teacher(Protocol):
    """Who gives what a student is compared with."""

    def teach(self, micros: Sequence[Batch], step: int | None) -> Iterator[Batch]:
        """What belongs into each micro-batch beside its own, in order. Collective; step None is an evaluation."""

    def signature(self, step: int | None) -> str:
        """What tensors there are at a step, of all ranks: equal where they are."""


class LiveTeacher:
    """A model that computes when it is asked."""

    def __init__(
        self,
        teaching: Teaching,
        model: Model,
        distillation: Distillation,
        seats: Seats,
        world: World,
        autocast: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        """
        Args:
            teaching: the teacher, spread over `world`.
            model: its shape.
            distillation: of the student.
            seats: what each rank of the student is about.
            world: of the teacher: the same processes as the student's, at the teacher's layout.
        """
        self.teaching, self.model, self.distillation = teaching, model, distillation
        self.seats, self.world, self.autocast = seats, world, autocast
        self.places = places(world.layout)
        self.routes: dict[tuple, Route] = {}

    def signature(self, step: int | None) -> str:
        return str(self.distillation.wanted(step))

    def teach(self, micros: Sequence[Batch], step: int | None) -> Iterator[Batch]:
        wanted = self.distillation.wanted(step)
        if not wanted.others:
            return (self._teach(micro, wanted) for micro in micros)
        taught = [self._teach(micro, wanted) for micro in micros]
        means = [found.pop(names.OTHERS) for found in taught if names.OTHERS in found]
        others = self._by_slot(torch.cat(means) if means else None, micros)
        if others is None:
            return iter(taught)
        pairs = zip(taught, micros, strict=True)
        return (found | {names.OTHERS: others.expand(len(micro["slot"]), -1, -1)} for found, micro in pairs)

    @torch.no_grad()
    def _teach(self, micro: Batch, wanted: Wanted) -> Batch:
        sizes = self._sizes(_rows(micro))
        rows = self._dealt(sum(sizes))
        with self.autocast():
            found = self.teaching(self._inputs(micro, sizes, rows), wanted)
        mine = rows[self.world.rank]
        found = {name: x[: len(mine)] for name, x in found.items()}
        return self._given(found, wanted, sizes, rows)

    def _sizes(self, mine: int) -> list[int]:
        """Rows of every data rank of the student; in an evaluation they may differ."""
        layout = self.seats.layout
        if layout.data == 1:
            return [mine]
        counts = torch.zeros(layout.data, dtype=torch.int64, device=self.world.device)
        place = self.seats.places[self.world.rank]
        if (place.pipeline, place.context, place.tensor) == (0, 0, 0):
            counts[data_rank(place, layout)] = mine
        dist.all_reduce(counts)
        return counts.tolist()

    def _dealt(self, total: int) -> Rows:
        """Rows of every rank of the teacher."""
        ranges = row_ranges(even(total, self.world.layout.data))
        return [ranges[data_rank(place, self.world.layout)] for place in self.places]

    def _inputs(self, micro: Batch, sizes: list[int], rows: Rows) -> Batch:
        """The rows that this rank of the teacher reads; one that has none reads the first, for company."""
        read = {name: x for name, x in micro.items() if name in READS}
        path = self._route(
            "inputs", sizes, lambda: (self._students(sizes), [Holding.of(n or (0,)) for n in rows])
        )
        return dict(zip(read, self._exchange([Item(x, path) for x in read.values()]), strict=True))  # type: ignore

    def _students(self, sizes: list[int]) -> list[Holding]:
        """Rows of every rank of the student."""
        rows = row_ranges(sizes)
        return [Holding.of(rows[data_rank(place, self.seats.layout)]) for place in self.seats.places]

    def _given(self, found: Batch, wanted: Wanted, sizes: list[int], rows: Rows) -> Batch:
        """What this rank of the student is compared with."""
        known, theirs = {target.name: target for target in wanted.targets}, row_ranges(sizes)
        items = []
        for name, x in found.items():
            if name in known:
                both = partial(self._of_layer, known[name], rows, theirs)
            else:
                both = partial(self._of_outputs, name, x.dim(), rows, theirs)
            items.append(Item(x, self._route(name, sizes, both)))
        got = self._exchange(items)
        return {name: x for name, x in zip(found, got, strict=True) if x is not None}

    def _of_layer(self, target: Target, rows: Rows, theirs: Rows) -> tuple[list[Holding], list[Holding]]:
        """What every rank of the teacher has of a layer's tensor, and what every rank of the student wants of it."""
        layout, length = self.world.layout, self._length(target)
        heads = self.model.kv if target.what in ("keys", "values") else self.model.heads
        have, want = [], []
        for rank, (mine, place) in enumerate(zip(rows, self.places, strict=True)):
            columns = tuple(range(length)) if target.what == "bias" else columns_of(length, layout, place)
            if target.what == "bias" and place.context:  # the first has the first row and the last
                mine = ()
            by_heads = target.what not in ("inputs", "states")
            cut = (share(tuple(range(heads)), layout, place),) if by_heads else ()
            have.append(Holding.of(mine, columns, *cut))
            want.append(self.seats.of_layer(rank, target, theirs, length))
        return have, want

    def _of_outputs(
        self, name: str, dims: int, rows: Rows, theirs: Rows
    ) -> tuple[list[Holding], list[Holding]]:
        """The same of what follows the last layer."""
        ranks = range(len(rows))
        if dims == 2 and name != names.REST:
            have = [Holding.of(mine) for mine in rows]
            return have, [self.seats.of_rows(rank, theirs, name == names.OTHERS) for rank in ranks]
        length = self.distillation.lengths[len(self.distillation.lessons) - 1]
        layout = replace(self.world.layout, context=1) if self.seats.images else self.world.layout
        have = [Holding.of(n, columns_of(length, layout, p)) for n, p in zip(rows, self.places, strict=True)]
        return have, [self.seats.of_columns(rank, theirs, length) for rank in ranks]

    def _length(self, target: Target) -> int:
        """Of the second dim of a layer's tensor."""
        tower = target.tower - 1 if target.across and target.what != "q" else target.tower
        length = self.distillation.lengths[tower]
        return 2 * length - 1 if target.what == "bias" else length

    def _by_slot(self, others_NE: Tensor | None, micros: Sequence[Batch]) -> Tensor | None:
        """Representations of all micro-batches in the order of the global batch, [1, N, E]; None where this rank's
        stages do not want them."""
        slots = []
        for micro in micros:
            sizes = self._sizes(len(micro["slot"]))
            every = [Holding.of(tuple(range(sum(sizes))))] * self.world.size
            path = self._route("slot", sizes, lambda s=sizes, e=every: (self._students(s), e))  # type: ignore
            slots += self._exchange([Item(micro["slot"], path)])
        if others_NE is None:
            return None
        return others_NE[torch.cat(slots).argsort()].unsqueeze(0)  # type: ignore[arg-type]

    def _route(
        self, name: str, sizes: list[int], both: Callable[[], tuple[list[Holding], list[Holding]]]
    ) -> Route:
        """The way of a tensor; found once for batches of the same sizes."""
        key = (name, *sizes)
        if key not in self.routes:
            self.routes[key] = route(*both(), self.world.rank)
        return self.routes[key]

    def _exchange(self, items: Sequence[Item]) -> list[Tensor | None]:
        return exchange(items, self.world.rank, self.world.size)


def _rows(micro: Batch) -> int:
    """Of a micro-batch; one of an evaluation has no slots in a global batch."""
    return len(next(iter(micro.values())))
