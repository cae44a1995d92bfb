"""What each rank of a student needs of a teacher, and how a student's taps work where it is spread."""

from __future__ import annotations

from collections.abc import Mapping

from headway.parallel.distill.holdings import (
    Holding,
    columns_of,
    data_rank,
    nothing,
    places,
    share,
)
from headway.parallel.mesh import Layout
from headway.parallel.pipeline.plan import Plan
from headway.pretrain.config import Job, Model
from headway.pretrain.errors import JobError
from headway.pretrain.objectives.distill.distillation import Distillation
from headway.pretrain.objectives.distill.names import Target

Rows = list[tuple[int, ...]]
"""Numbers of the rows of every data rank."""
MAPS = ("q", "k", "bias")


class Seats:
    """The student's ranks, and what their blocks learn.

    Args:
        job: the student's.
        teacher: shape of the teacher.
        layout: of the student.
        distillation: what is learned.
        plan: of a pipeline.
    """

    def __init__(
        self, job: Job, teacher: Model, layout: Layout, distillation: Distillation, plan: Plan | None
    ) -> None:
        self.job, self.teacher, self.layout = job, teacher, layout
        self.distillation, self.plan = distillation, plan
        self.places = places(layout)
        self.images = job.model.family == "vit"

    def of_layer(self, rank: int, target: Target, rows: Rows, length: int) -> Holding:
        """What a rank wants of a layer's tensor."""
        place, heads = self.places[rank], self._heads(target, rank)
        if not self._learns(place.pipeline, target):
            return nothing(2 + len(heads))
        mine = rows[data_rank(place, self.layout)]
        columns = tuple(range(length)) if target.what == "bias" else columns_of(length, self.layout, place)
        return Holding.of(mine, columns, *heads)

    def of_columns(self, rank: int, rows: Rows, length: int) -> Holding:
        """What a rank wants of last hidden states and words."""
        place = self.places[rank]
        if not self._ends(place.pipeline):
            return nothing(2)
        whole = tuple(range(length))
        columns = whole if self.images else columns_of(length, self.layout, place)
        return Holding.of(rows[data_rank(place, self.layout)], columns)

    def of_rows(self, rank: int, rows: Rows, every: bool) -> Holding:
        """What a rank wants of a tensor that has no columns; `every` row, or its own."""
        place = self.places[rank]
        if not self._ends(place.pipeline):
            return nothing(1)
        if every:
            return Holding.of(tuple(n for some in rows for n in some))
        return Holding.of(rows[data_rank(place, self.layout)])

    def length(self, target: Target) -> int:
        """Of the second dim of a layer's tensor."""
        tower = target.tower - 1 if target.across and target.what != "q" else target.tower
        length = self.distillation.lengths[tower]
        return 2 * length - 1 if target.what == "bias" else length

    @property
    def last_length(self) -> int:
        """Of the last tower's rows."""
        return self.distillation.lengths[len(self.distillation.lessons) - 1]

    def here(self, pipeline: int) -> Mapping[int, set[int]] | None:
        """Layers of every tower at a place of the pipeline; None for all."""
        if self.plan is None:
            return None
        found: dict[int, set[int]] = {}
        for stage in self.plan.at(pipeline):
            for tower, (first, stop) in stage.spans.items():
                found.setdefault(tower, set()).update(range(first, stop))
        return found

    def _learns(self, pipeline: int, target: Target) -> bool:
        layers = self.here(pipeline)
        return layers is None or target in self.distillation.wanted(None, layers).targets

    def _ends(self, pipeline: int) -> bool:
        return self.plan is None or any(stage.last for stage in self.plan.at(pipeline))

    def _heads(self, target: Target, rank: int) -> tuple[tuple[int, ...], ...]:
        """Numbers of the teacher's heads that a rank's heads learn from, if the tensor has heads."""
        place = self.places[rank]
        if target.what in ("inputs", "states"):
            return ()
        if target.what in MAPS:
            return (share(heads_of(self.job, self.teacher), self.layout, place),)
        count = self.teacher.heads if target.what == "queries" else self.teacher.kv
        return (share(tuple(range(count)), self.layout, place),)


def heads_of(job: Job, teacher: Model) -> tuple[int, ...]:
    """The teacher's heads that the student's heads learn from, in their order: as many for each."""
    chosen = job.objective.distill.attention.heads
    return tuple(chosen) if isinstance(chosen, list) else tuple(range(teacher.heads))


def check_layout(job: Job, teacher: Model, layout: Layout) -> None:
    """Raise JobError where a student's layout does not suit what it learns."""
    settings, ranks = job.objective.distill, layout.tensor
    if "relations" not in settings.terms or ranks == 1:
        return
    heads = settings.relations.heads or job.model.heads
    if heads % ranks:
        rule = f"tensor ranks have whole relation heads: parallel.tensor = {ranks} must divide them"
        raise JobError("objective.distill.relations.heads", heads, rule, -(-heads // ranks) * ranks)
    for model, whose in ((job.model, "student"), (teacher, "teacher")):
        for what in settings.relations.of:
            count = model.heads if what == "queries" else model.kv
            if count % ranks:
                rule = f"relations of {what} are cut by the {whose}'s {count} heads: must divide them"
                raise JobError("parallel.tensor", ranks, rule, 1)
