"""Which layer of a teacher each layer of a student learns from."""

from __future__ import annotations

from headway.pretrain.config.distill import Layers
from headway.pretrain.errors import JobError


def layer_map(how: Layers, students: int, teachers: int, field: str) -> list[int | None]:
    """The teacher's layer of every student's layer, from 0; None where there is none.

    `uniform` is TinyBERT's g(m) = m (teachers / students), counted from 1: evenly spaced, up to the last.

    Args:
        how: the setting.
        students, teachers: how many layers each has.
        field: where the setting stands, for messages.

    Raises:
        JobError: the numbers do not fit.
    """
    if isinstance(how, list):
        return _given(how, students, teachers, field)
    if how == "last":
        return [None] * (students - 1) + [teachers - 1]
    if students > teachers:
        rule = f"{students} layers of the student cannot each have one of the teacher's {teachers}"
        raise JobError(field, how, rule, "last")
    if how == "top":
        return list(range(teachers - students, teachers))
    if how == "bottom":
        return list(range(students))
    if teachers % students:
        rule = f"{students} layers cannot be spread evenly over the teacher's {teachers}"
        raise JobError(field, how, rule, [teachers * (i + 1) // students - 1 for i in range(students)])
    step = teachers // students
    return [step * (i + 1) - 1 for i in range(students)]


def _given(how: list[int | None], students: int, teachers: int, field: str) -> list[int | None]:
    if len(how) != students:
        rule = f"names a layer of the teacher (or null) for each of the student's {students} layers"
        raise JobError(field, how, rule, layer_map("last", students, teachers, field))
    if beyond := [layer for layer in how if layer is not None and layer >= teachers]:
        rule = f"the teacher has layers 0 to {teachers - 1}, and none {beyond[0]}"
        raise JobError(field, how, rule, [None if x is None else min(x, teachers - 1) for x in how])
    return how
