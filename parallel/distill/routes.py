"""The ways of rows to a teacher, and of what it gives to the ranks of its student: from layouts alone.

Ranks are numbered over all processes of the run. Where the teacher has ranks of its own, they are the last.

Shapes: B batch, S sequence, H heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor

from headway.parallel.distill.holdings import (
    Holding,
    columns_of,
    data_rank,
    even,
    nothing,
    places,
    row_ranges,
    share,
)
from headway.parallel.distill.redistribute import Item, Route, exchange, route
from headway.parallel.distill.student import Rows, Seats
from headway.parallel.mesh import Layout
from headway.pretrain.config import Model
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.distillation import Distillation, Wanted
from headway.pretrain.objectives.distill.names import Target

Both = tuple[list[Holding], list[Holding]]
"""What every rank has and what every rank wants."""


class Routes:
    """Found once for batches of the same sizes.

    Args:
        seats: of the student.
        model: shape of the teacher.
        distillation: of the student.
        layout: of the teacher.
        rank: this one's number.
        apart: whether the teacher has ranks of its own.
    """

    def __init__(
        self, seats: Seats, model: Model, distillation: Distillation, layout: Layout, rank: int, apart: bool
    ) -> None:
        self.seats, self.model, self.distillation = seats, model, distillation
        self.layout, self.rank = layout, rank
        self.places = places(layout)
        self.before = len(seats.places) if apart else 0
        self.ranks = self.before + len(self.places)
        self.known: dict[tuple, Route] = {}

    def inputs(self, sizes: list[int]) -> Route:
        """Of rows that a model reads; a rank of the teacher that has none reads the first, for company."""
        rows = self.rows(sizes)
        return self._found(
            "inputs", sizes, lambda: self._ways(self._students(sizes), [r or (0,) for r in rows])
        )

    def slots(self, sizes: list[int]) -> Route:
        """Of places in the global batch, which all of the student's ranks learn."""
        every = tuple(range(sum(sizes)))
        return self._found(
            "slots", sizes, lambda: self._back(self._students(sizes), [every] * len(self.places))
        )

    def outputs(self, found: dict[str, Tensor], wanted: Wanted, sizes: list[int]) -> list[Item]:
        """Of what a teacher gives, tensor by tensor."""
        known, rows, theirs = {t.name: t for t in wanted.targets}, self.rows(sizes), row_ranges(sizes)
        items = []
        for name, x in found.items():
            if name in known:
                ways = partial(self._of_layer, known[name], rows, theirs)
            else:
                ways = partial(self._after_layers, name, x.dim(), rows, theirs)
            items.append(Item(x, self._found(name, sizes, ways)))
        return items

    def exchange(self, items: Sequence[Item]) -> list[Tensor | None]:
        """What this rank wants; collective over all ranks."""
        return exchange(items, self.rank, self.ranks)

    def rows(self, sizes: list[int]) -> Rows:
        """Numbers of the rows of every rank of the teacher."""
        ranges = row_ranges(even(sum(sizes), self.layout.data))
        return [ranges[data_rank(place, self.layout)] for place in self.places]

    def mine(self, sizes: list[int]) -> int:
        """How many rows this rank of the teacher has."""
        return len(self.rows(sizes)[self.rank - self.before])

    # -- pieces --------------------------------------------------------------------------------------------

    def _students(self, sizes: list[int]) -> Rows:
        """Rows of every rank of the student."""
        rows = row_ranges(sizes)
        return [rows[data_rank(place, self.seats.layout)] for place in self.seats.places]

    def _ways(self, theirs: Rows, ours: Rows) -> Both:
        """From rows of the student's ranks to rows of the teacher's."""
        return self._both([Holding.of(n) for n in theirs], [Holding.of(n) for n in ours], to_teacher=True)

    def _back(self, theirs: Rows, every: Rows) -> Both:
        """From rows of the student's ranks to rows of the student's ranks."""
        have = [Holding.of(n) for n in theirs]
        want = [Holding.of(every[0])] * len(have)
        none = [nothing(1)] * (self.ranks - len(have))
        return [*have, *none], [*want, *none]

    def _of_layer(self, target: Target, rows: Rows, theirs: Rows) -> Both:
        """Of a layer's tensor."""
        length = self.seats.length(target)
        heads = self.model.kv if target.what in ("keys", "values") else self.model.heads
        by_heads = target.what not in ("inputs", "states")
        have = []
        for mine, place in zip(rows, self.places, strict=True):
            columns = columns_of(length, self.layout, place)
            if target.what == "bias":  # the first context rank has the first row of scores and the last
                columns, mine = tuple(range(length)), () if place.context else mine
            cut = (share(tuple(range(heads)), self.layout, place),) if by_heads else ()
            have.append(Holding.of(mine, columns, *cut))
        want = [self.seats.of_layer(r, target, theirs, length) for r in range(len(self.seats.places))]
        return self._both(want, have, to_teacher=False)

    def _after_layers(self, name: str, dims: int, rows: Rows, theirs: Rows) -> Both:
        """Of what follows the last layer."""
        students = range(len(self.seats.places))
        if dims == 2 and name != names.REST:
            have = [Holding.of(mine) for mine in rows]
            want = [self.seats.of_rows(rank, theirs, name == names.OTHERS) for rank in students]
            return self._both(want, have, to_teacher=False)
        length = self.seats.last_length
        layout = replace(self.layout, context=1) if self.seats.images else self.layout
        have = [Holding.of(n, columns_of(length, layout, p)) for n, p in zip(rows, self.places, strict=True)]
        want = [self.seats.of_columns(rank, theirs, length) for rank in students]
        return self._both(want, have, to_teacher=False)

    def _both(self, student: list[Holding], teacher: list[Holding], *, to_teacher: bool) -> Both:
        """Holdings of all ranks, of which those of one side have and those of the other want."""
        if self.before:
            none = nothing(len(teacher[0].dims))
            student = student + [none] * len(teacher)
            teacher = [none] * self.before + teacher
        return (student, teacher) if to_teacher else (teacher, student)

    def _found(self, name: str, sizes: list[int], ways: Callable[[], Both]) -> Route:
        key = (name, *sizes)
        if key not in self.known:
            self.known[key] = route(*ways(), self.rank)
        return self.known[key]
