"""A student's attention beside its teacher's, for the report: which maps belong together, and what they are.

Shapes: L layers, H heads, S positions, P pairs of layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headway.kernels.attention.registry import mechanism
from headway.launch.assemble import Parts
from headway.parallel.distill.apart import FarTeacher
from headway.parallel.distill.student import heads_of
from headway.parallel.distill.teacher import LiveTeacher
from headway.pretrain.config import Job, Model
from headway.pretrain.engine import Batch
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import word_of
from headway.pretrain.models.maps import mapped_layers
from headway.pretrain.models.seat import Seat
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.distill.layers import layer_map
from headway.pretrain.objectives.distill.lessons import FIELD, lessons
from headway.pretrain.records.attention_maps import AttentionMaps
from headway.pretrain.records.map_pairs import Array, MapPairs

CACHED = f"The teacher is read from a cache, which has no attention maps: {FIELD}.teacher would show them."
APART = (
    "The teacher computes on ranks of its own (parallel.teacher.ranks), which have ended when this is drawn."
)
NO_MAPS = "The {} has no attention maps: none of its layers weighs places ({})."

Layers = list[tuple[int, int]]
"""The student's layer and the teacher's, from 0, of every pair."""


def compare(parts: Parts, objective: Objective, batch: Batch, maps: AttentionMaps | None) -> MapPairs | None:
    """Maps of a student and its teacher; None if the run has no teacher. Collective.

    Args:
        objective: of the student, whole.
        batch: one sample, the same on every rank.
        maps: the student's, of that sample.
    """
    job, teacher = parts.job, parts.engine.teacher
    if not job.objective.distill.on:
        return None
    if not isinstance(teacher, LiveTeacher):
        return MapPairs.none(APART if isinstance(teacher, FarTeacher) else CACHED)
    if maps is None:
        return MapPairs.none(NO_MAPS.format("student", words(job.model, range(job.model.layers))))
    try:
        layers, heads = layer_pairs(job, teacher.model), head_groups(job, teacher.model)
    except JobError as fault:
        return MapPairs.none(f"Maps of student and teacher do not belong together one by one: {fault.rule}.")
    theirs = teacher.attention_maps(batch)
    if len(theirs) == 0:
        return MapPairs.none(NO_MAPS.format("teacher", words(teacher.model, range(teacher.model.layers))))
    known = mapped_layers(objective.model), mapped_layers(teacher.teaching.objective.model)
    there, notes = present(layers, (job.model, teacher.model), known)
    if job.model.family == "t5":
        notes.append("Maps are those of the encoder.")
    if unsuited := unlike(maps, theirs, job.model, teacher.model):
        return MapPairs.none(f"Maps cannot be compared: {unsuited}.")
    student = maps.weights[[known[0].index(ours) for ours, _ in there]]
    taught = theirs[[known[1].index(layer) for _, layer in there], 0].float().cpu().numpy()
    seen = [softmax(job.model, ours) for ours, _ in there]
    averaged = [learned_from(*each, heads) for each in zip(taught, student, seen, strict=True)]
    documents = batch.get("documents")
    counted = None if documents is None else (documents[0] >= 0).cpu().numpy()
    learned = "attention" in job.objective.distill.terms
    beside = np.array(averaged).reshape(student.shape)
    return MapPairs(maps.tokens, there, heads, student, beside, counted, learned, tuple(notes))


def layer_pairs(job: Job, teacher: Model) -> Layers:
    """Layers of the first tower whose maps are learned from one another, or, where maps are no part of the loss, that
    `objective.distill.layers` pairs.

    Raises:
        JobError: it does not fit.
    """
    settings, student = job.objective.distill, job.model
    if "attention" in settings.terms:
        tower = lessons(settings, student, teacher)[0]
        return [(lesson.layer, lesson.attention) for lesson in tower if lesson.attention is not None]
    found = layer_map(settings.layers, student.layers, teacher.layers, f"{FIELD}.layers")
    return [(layer, source) for layer, source in enumerate(found) if source is not None]


def head_groups(job: Job, teacher: Model) -> list[list[int]]:
    """The teacher's heads of every head of the student.

    Raises:
        JobError: the numbers do not fit.
    """
    chosen, ours = heads_of(job, teacher), job.model.heads
    if len(chosen) % ours or max(chosen) >= teacher.heads:
        rule = f"the teacher's {teacher.heads} heads are no multiple of the student's {ours}"
        raise JobError(f"{FIELD}.attention.heads", job.objective.distill.attention.heads, rule, None)
    each = len(chosen) // ours
    return [list(chosen[i * each : (i + 1) * each]) for i in range(ours)]


def present(
    layers: Layers, models: tuple[Model, Model], known: tuple[Sequence[int], Sequence[int]]
) -> tuple[Layers, list[str]]:
    """The pairs where both have maps, and a sentence for each model that lacks some.

    Args:
        models: student and teacher.
        known: layers of each that have maps.
    """
    notes = []
    for side, whose in enumerate(("student", "teacher")):
        lacking = sorted({pair[side] for pair in layers} - set(known[side]))
        if lacking:
            named = ", ".join(str(layer + 1) for layer in lacking)
            what = words(models[side], lacking)
            notes.append(f"The {whose}'s layers without attention maps are left out: {named} ({what}).")
    return [pair for pair in layers if pair[0] in known[0] and pair[1] in known[1]], notes


def words(model: Model, layers: Sequence[int]) -> str:
    """Mechanisms of some layers."""
    return ", ".join(dict.fromkeys(word_of(model.attention, Seat(layer)) for layer in layers))


def softmax(model: Model, layer: int) -> bool:
    """Whether a layer gives every key that it sees a weight."""
    part = mechanism(word_of(model.attention, Seat(layer))).part
    return part is not None and part.fused


def unlike(maps: AttentionMaps, theirs: torch.Tensor, student: Model, teacher: Model) -> str | None:
    """What keeps a student's maps [L, H, S, S] from being compared with a teacher's [L, B, H, S, S]."""
    if theirs.shape[-1] != len(maps.tokens):
        return f"the student reads {len(maps.tokens)} places of the sample, the teacher {theirs.shape[-1]}"
    for whose, model, count in (
        ("student", student, maps.weights.shape[1]),
        ("teacher", teacher, theirs.shape[2]),
    ):
        if count != model.heads:
            return f"the {whose}'s {model.heads} heads have {count} maps"
    return None


def learned_from(teacher: Array, student: Array, seen: bool, heads: list[list[int]]) -> Array:
    """The means of the teacher's maps that belong to each head of the student, [H, S, S], as the loss takes them.

    Args:
        teacher: [heads, S, S].
        student: [H, S, S].
        seen: the student gives every key that it sees a weight: where it has none the teacher's do not count either (a
            window of the student's leaves the rest out), and what is left of each map sums to 1.
        heads: see `head_groups`.
    """
    found = []
    for q_SS, group in zip(student, heads, strict=True):
        p_GSS = teacher[group]
        if seen:
            p_GSS = np.where(q_SS != 0, p_GSS, 0)
            total = p_GSS.sum(-1, keepdims=True)
            p_GSS = p_GSS / np.where(total > 0, total, 1)
        found.append(p_GSS.mean(0))
    return np.stack(found)
