"""What every block of a student learns from which layer of the teacher, and what a teacher must give for it.

All that can be wrong about a pair of models is found here, from their configs alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

from headway.kernels.attention.registry import mechanism
from headway.pretrain.config import Model
from headway.pretrain.config.distill import Distill, Layers, Maps, States, Term
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import word_of
from headway.pretrain.models.seat import Seat
from headway.pretrain.objectives.distill.layers import layer_map
from headway.pretrain.objectives.distill.names import Target

FIELD = "objective.distill"


@dataclass(frozen=True)
class Lesson:
    """What one block of a student learns: for each part of the loss the teacher's layer, or None.

    Attributes:
        tower, layer: which block, from 0.
        attention, across, relations, states, rows: see `headway.pretrain.config.distill.Distill`.
        inputs: the teacher's layer whose input is learned.
    """

    tower: int
    layer: int
    attention: int | None = None
    across: int | None = None
    relations: int | None = None
    states: int | None = None
    rows: int | None = None
    inputs: int | None = None

    @property
    def any(self) -> bool:
        return self != Lesson(self.tower, self.layer)


def depths(model: Model) -> list[int]:
    """Layers of every tower."""
    return [model.layers, model.decoder_depth] if model.family == "t5" else [model.layers]


def lessons(settings: Distill, student: Model, teacher: Model) -> list[list[Lesson]]:
    """What every block learns, by tower.

    Raises:
        JobError: models, layers or heads that do not fit.
    """
    check_models(settings, student, teacher)
    found = []
    for tower, (ours, theirs) in enumerate(zip(depths(student), depths(teacher), strict=True)):
        blocks = [Lesson(tower, layer) for layer in range(ours)]
        for name in ("attention", "relations", "states", "rows"):
            term = getattr(settings, name)
            if not term.weight:
                continue
            how, field = _how(settings, name)
            for layer, source in enumerate(layer_map(how, ours, theirs, field)):
                blocks[layer] = replace(blocks[layer], **{name: source})  # type: ignore[arg-type]
                if name == "attention" and tower and term.across:
                    blocks[layer] = replace(blocks[layer], across=source)
        if settings.states.weight and settings.states.embeddings:
            blocks[0] = replace(blocks[0], inputs=0)
        found.append(blocks)
    for lesson in chain(*found):
        _check_mechanisms(lesson, student, teacher)
    return found


def _how(settings: Distill, name: str) -> tuple[Layers, str]:
    own = getattr(settings, name).layers
    return (settings.layers, f"{FIELD}.layers") if own is None else (own, f"{FIELD}.{name}.layers")


def targets(settings: Distill, lesson: Lesson, step: int | None = None) -> Iterator[Target]:
    """What a block's lesson needs of the teacher at a step; None asks for all that any step needs."""

    def at(name: str) -> bool:
        return active(getattr(settings, name), lesson, step)

    tower = lesson.tower
    for layer, across in ((lesson.attention, False), (lesson.across, True)):
        if layer is not None and at("attention"):
            yield Target(tower, layer, "q", across)
            yield Target(tower, layer, "k", across)
            if not across:
                yield Target(tower, layer, "bias")
    if lesson.relations is not None and at("relations"):
        yield from (Target(tower, lesson.relations, what) for what in settings.relations.of)
    if lesson.rows is not None and at("rows"):
        yield Target(tower, lesson.rows, "q")
        yield Target(tower, lesson.rows, "k")
        yield Target(tower, lesson.rows, "bias")
    if lesson.states is not None and at("states"):
        yield Target(tower, lesson.states, "states")
    if lesson.inputs is not None and settings.states.at(step):
        yield Target(tower, lesson.inputs, "inputs")


def active(term: Term, lesson: Lesson, step: int | None) -> bool:
    """Whether a block learns a part of the loss at a step."""
    if not term.at(step):
        return False
    if step is None or not (isinstance(term, Maps | States) and term.progressive):
        return True
    return (step - term.begin) // term.progressive == lesson.layer


def frozen_below(settings: Distill, layers: int, step: int) -> int:
    """Blocks, from the first on, that do not move at a step: those below the one that is matched alone."""
    return max(
        (
            place
            for term in (settings.attention, settings.states)
            if term.at(step) and term.progressive
            if (place := (step - term.begin) // term.progressive) < layers
        ),
        default=0,
    )


def check_models(settings: Distill, student: Model, teacher: Model) -> None:
    """Raise JobError for a teacher that a student cannot learn from."""
    if student.family != teacher.family:
        rule = (
            f"the student is a {student.family}, the teacher a {teacher.family}: they must be of one family"
        )
        raise JobError(f"{FIELD}.teacher", settings.teacher, rule, f"a {student.family}")
    by_layer = [name for name in ("attention", "relations", "states", "rows") if name in settings.terms]
    if by_layer and (student.unique_layers or student.layers) != student.layers:
        rule = (
            f"{FIELD}.{by_layer[0]} is learned layer by layer: the student's layers need weights of their own"
        )
        raise JobError("model.unique_layers", student.unique_layers, rule, student.layers)
    if "attention" in settings.terms or "rows" in settings.terms:
        _check_heads(settings, student, teacher)
    if "relations" in settings.terms:
        _check_relations(settings, student, teacher)


def _check_heads(settings: Distill, student: Model, teacher: Model) -> None:
    ours, theirs, heads = student.heads, teacher.heads, settings.attention.heads
    field = f"{FIELD}.attention.heads"
    if isinstance(heads, list):
        if len(heads) != ours or max(heads) >= theirs:
            rule = f"names one of the teacher's {theirs} heads for each of the student's {ours}"
            raise JobError(field, heads, rule, [i * theirs // ours for i in range(ours)])
    elif theirs % ours:
        rule = f"the teacher's {theirs} heads are no multiple of the student's {ours}: name a head for each"
        raise JobError(field, heads, rule, [i * theirs // ours for i in range(ours)])


def _check_mechanisms(lesson: Lesson, student: Model, teacher: Model) -> None:
    """Maps are compared where they are softmax(scores), a teacher's over all keys that the student sees; relations
    where there are heads."""
    for name, source in (("attention", lesson.attention), ("rows", lesson.rows), ("across", lesson.across)):
        if source is None:
            continue
        across = name == "across"
        ours, theirs = _seen(student, lesson.layer, across), _seen(teacher, source, across)
        for whose, layer, word in (("student", lesson.layer, ours[0]), ("teacher", source, theirs[0])):
            part = mechanism(word).part
            narrow = part is not None and part.scope is not None and whose == "teacher" and ours != theirs
            if part is None or not part.fused or narrow:
                over = " over all keys that the student sees" if whose == "teacher" else ""
                rule = f"maps are compared that are the softmax of a product of queries and keys{over}"
                rule += f"; {FIELD}.relations suits any attention by heads"
                raise JobError(f"model.attention ({whose}, layer {layer})", word, rule, "dense")
    if lesson.relations is None:
        return
    for whose, model, layer in (("student", student, lesson.layer), ("teacher", teacher, lesson.relations)):
        word, _ = _seen(model, layer)
        if mechanism(word).kind == "mixer":
            rule = "has no queries, keys and values by heads that could be related"
            raise JobError(f"model.attention ({whose}, layer {layer})", word, rule, "dense")


def _seen(model: Model, layer: int, across: bool = False) -> tuple[str, dict[str, Any]]:
    """A layer's mechanism, and the numbers that it reads."""
    word = word_of(model.attention, Seat(layer, cross=across))
    return word, model.attention.settings(layer, mechanism(word).settings)


def _check_relations(settings: Distill, student: Model, teacher: Model) -> None:
    heads = settings.relations.heads or student.heads
    for model, whose in ((student, "student"), (teacher, "teacher")):
        for what in settings.relations.of:
            width = (model.heads if what == "queries" else model.kv) * model.head_width
            if width % heads:
                rule = f"must divide the {width} features of the {whose}'s {what}"
                nearest = max(n for n in range(1, heads + 1) if width % n == 0)
                raise JobError(f"{FIELD}.relations.heads", heads, rule, nearest)
