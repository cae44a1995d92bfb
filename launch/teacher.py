"""A run's teacher: checked before the first step, built at its layout, filled with its weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor

from headway.launch.start_from import is_weight, start_from
from headway.launch.teacher_source import TeacherSource, open_teacher
from headway.parallel.distill.apart import FarTeacher
from headway.parallel.distill.hire import Fill, copy_rows, serve
from headway.parallel.distill.hire import hire as put_beside
from headway.parallel.distill.teacher import LiveTeacher
from headway.parallel.engines.base import BaseEngine
from headway.parallel.mesh import World
from headway.pretrain.config import Job, Parallel
from headway.pretrain.data.dataset import Dataset, open_dataset
from headway.pretrain.errors import JobError
from headway.pretrain.hf.writing import inputs_of
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import Objective, build_objective
from headway.pretrain.objectives.distill.attach import TeacherShape
from headway.pretrain.objectives.distill.layers import layer_map

PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "fp16": "bf16", "fp8": "bf16", "fp64": "fp64"}
"""Of the teacher, if it is not said: that of the student's products, but for narrower ones."""


def find_teacher(job: Job, dataset: Dataset) -> TeacherSource | None:
    """The teacher of a job, found and checked; None if it has none.

    Raises:
        JobError: there is none there, or one that the student cannot learn from.
    """
    place = job.objective.distill.teacher
    if place is None or not job.objective.distill.on:
        return None
    source = open_teacher(place)
    check_objective(source, job)
    if job.model.family != "vit":
        check_words(source, job, dataset)
    check_rows(source, job, dataset.inputs)
    return source


def check_objective(source: TeacherSource, job: Job) -> None:
    """The teacher has been taught what it is asked."""
    settings = job.objective.distill
    if not settings.logits.weight:
        return
    ours, theirs = job.objective.name, source.job.objective.name
    classify = "classify" in (ours, theirs)
    if (ours == theirs if classify else True) and has_head(source):
        return
    rule = f"soft targets need a teacher with a head; {source.path} was trained for {theirs}"
    rule += "" if has_head(source) else ", and has none"
    raise JobError("objective.distill.logits.weight", settings.logits.weight, rule, 0)


def has_head(source: TeacherSource) -> bool:
    """Whether a teacher predicts words or classes."""
    shapes, model = source.shapes, source.job.model
    if model.family == "vit":
        return "head.weight" in shapes
    if model.family == "bert":
        return "head.transform.weight" in shapes
    return model.tied or "head.weight" in shapes


def check_words(source: TeacherSource, job: Job, dataset: Dataset) -> None:
    """Both read the same words."""
    assert dataset.tokenizer is not None
    ours, theirs = dataset.tokenizer.pieces(), source.pieces()
    rows = source.shapes["model.embed.tokens.weight"][0]
    if theirs is not None and theirs != ours:
        apart = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
        where = f"{len(ours):,} pieces here, {len(theirs):,} there"
        if apart is not None:
            where += f"; piece {apart} is {ours[apart]!r} here and {theirs[apart]!r} there"
        rule = f"the teacher {source.path} reads another vocabulary ({where}): give the student its tokenizer"
        named = source.job.data.tokenizer.path or "the teacher's"
        raise JobError("data.tokenizer.path", job.data.tokenizer.path, rule, named)
    if rows < dataset.inputs.vocab:
        rule = (
            f"the teacher {source.path} knows {rows:,} words, the student's data has {dataset.inputs.vocab:,}"
        )
        raise JobError("data.tokenizer", job.data.tokenizer.kind, rule, "the teacher's tokenizer")


def check_rows(source: TeacherSource, job: Job, inputs: Inputs) -> None:
    """The teacher can read rows of that length, or images of that size."""
    theirs = inputs_of(source.job, source.shapes)
    if job.model.family == "vit":
        vision, images = source.job.model.vision, source.job.data.images
        for field, ours, value in (
            ("data.images.size", job.data.images.size, images.size),
            ("data.images.channels", job.data.images.channels, images.channels),
        ):
            if ours != value:
                raise JobError(field, ours, f"the teacher {source.path} reads images of another kind", value)
        by_place = job.objective.distill.terms.keys() - {"logits", "contrast"}
        if by_place and vision.patch != job.model.vision.patch:
            rule = f"places are compared one by one ({', '.join(sorted(by_place))}): patches as the teacher's"
            raise JobError("model.vision.patch", job.model.vision.patch, rule, vision.patch)
        for name in ("class_token", "distill_token"):
            here, there = getattr(job.model.vision, name), getattr(vision, name)
            if by_place and here != there:
                rule = (
                    f"places are compared one by one ({', '.join(sorted(by_place))}): tokens as the teacher's"
                )
                raise JobError(f"model.vision.{name}", here, rule, there)
        if job.objective.distill.logits.weight and theirs.classes != inputs.classes:
            rule = f"the teacher {source.path} knows {theirs.classes} classes, the data has {inputs.classes}"
            raise JobError("data.images", inputs.classes, rule, theirs.classes)
        return
    rows = max(job.data.seq_len, inputs.target_length)
    if source.job.model.positions == "learned" and rows > theirs.length:
        rule = f"the teacher {source.path} has {theirs.length} positions: rows may not be longer"
        raise JobError("data.seq_len", rows, rule, theirs.length)


def shape_of(source: TeacherSource) -> TeacherShape:
    """What the student must know before it is built."""
    model, shapes = source.job.model, source.shapes
    table = shapes.get("head.weight", shapes.get("model.embed.tokens.weight"))
    classes = shapes["head.weight"][0] if model.family == "vit" and "head.weight" in shapes else 0
    if model.family == "vit" or table is None or not has_head(source):
        return TeacherShape(model, classes=classes)
    vocab, width = table
    return TeacherShape(model, vocab, width, "head.bias" in shapes)


def teacher_job(source: TeacherSource, job: Job, precision: str) -> Job:
    """The job by which a teacher is built: its model, this run's rows and device."""
    theirs = source.job
    attention = theirs.model.attention.model_copy(update={"kernel": "auto"})
    model = theirs.model.model_copy(update={"attention": attention})
    data = theirs.data.model_copy(update={"seq_len": job.data.seq_len, "documents": job.data.documents})
    parallel = Parallel(context_method=job.parallel.context_method, sequence=job.parallel.sequence)
    update = {"model": model, "data": data, "parallel": parallel, "precision": precision}
    return theirs.model_copy(update=update)


def hire(
    source: TeacherSource, job: Job, engine: BaseEngine, dataset: Dataset, precision: str
) -> LiveTeacher | FarTeacher:
    """Put the teacher beside a student's engine, and give the student what it takes from its weights. Collective.

    Args:
        source: checked.
        job: the student's.
        engine: of the student, built.
        dataset: of the student.
        precision: of the student, resolved.

    Raises:
        JobError: the teacher's layout is impossible, or the student's does not suit what it learns.
    """
    teacher = put_beside(engine, *blank(source, job, dataset, precision))
    give_head(source, engine)
    return teacher


def teach(job: Job, world: World, precision: str) -> None:
    """Be a rank of the teacher until the student, which is on other ranks, is done. Collective.

    Args:
        job: the student's.
        world: of the teacher's ranks.
        precision: of the student, resolved.
    """
    dataset = open_dataset(job, progress=False)
    source = find_teacher(job, dataset)
    assert source is not None, "rules want a teacher where it has ranks of its own"
    told = dataset.inputs, dataset.specials, dataset.starts
    student = build_objective(job, *told, device="meta", teacher=shape_of(source))
    theirs, objective, fill = blank(source, job, dataset, precision, world.everyone)
    serve(job, student, theirs, objective, world, fill)


def blank(
    source: TeacherSource,
    job: Job,
    dataset: Dataset,
    precision: str,
    group: dist.ProcessGroup | None = None,
) -> tuple[Job, Objective, Fill]:
    """A teacher to be spread: the job by which it is built, its objective on the meta device, and what fills its
    weights on the ranks of a group. Other arguments are those of `hire`."""
    chosen = job.objective.distill.precision
    theirs = teacher_job(source, job, PRECISIONS[precision] if chosen == "auto" else chosen)
    known, model = inputs_of(theirs, source.shapes), theirs.model
    if model.positions == "learned" and model.max_positions is None and model.family != "vit":
        model = model.model_copy(update={"max_positions": known.length})
        theirs = theirs.model_copy(update={"model": model})
    reads = dataset.inputs._replace(vocab=known.vocab, classes=known.classes)
    stored = theirs.model_copy(
        update={"precision": source.precision}
    )  # what it computes in, it becomes when filled
    objective = build_objective(stored, reads, dataset.specials, device="meta")

    def fill(weights: Mapping[str, Tensor]) -> None:
        chosen = {name: tensor for name, tensor in weights.items() if is_weight(name)}
        start_from(chosen, source.job, str(source.path), group)

    return theirs, objective, fill


def give_head(source: TeacherSource, engine: BaseEngine) -> None:
    """Give a student the head that its teacher's hidden states are read by."""
    assert engine.objective.distillation is not None
    parameters = engine.objective.distillation.named_parameters()
    frozen = {name: p for name, p in parameters if name.startswith("head.")}
    if not frozen:
        return
    table = "head.weight" if "head.weight" in source.shapes else "model.embed.tokens.weight"
    ours = {table: "head.weight", "head.bias": "head.bias"}
    for name, tensor in source.tensors(ours):
        if ours[name] in frozen:
            copy_rows(frozen[ours[name]], tensor)


def begin_with(source: TeacherSource, job: Job, weights: Mapping[str, Tensor]) -> None:
    """Fill a new student with weights of its teacher: those of the layers that `objective.distill.init` names, and all
    that are not in layers.

    Raises:
        JobError: shapes differ.
    """
    how = job.objective.distill.init
    assert how is not None
    ours, theirs = job.model, source.job.model
    towers = {"": (ours.layers, theirs.layers)}
    if ours.family == "t5":
        towers = {
            "encoder.": (ours.layers, theirs.layers),
            "decoder.": (ours.decoder_depth, theirs.decoder_depth),
        }
    field = "objective.distill.init"
    renamed: dict[str, str] = {}
    for tower, (students, teachers) in towers.items():
        for layer, source_layer in enumerate(layer_map(how, students, teachers, field)):
            if source_layer is not None:
                renamed[f"model.{tower}blocks.{layer}."] = f"model.{tower}blocks.{source_layer}."
    wanted = {name: _theirs(name, renamed) for name in weights}
    missing = [name for name, other in wanted.items() if other not in source.shapes]
    if unknown := [name for name in missing if not name.startswith(("head.", "pair.", "model.pooler."))]:
        raise JobError(field, how, f"the teacher {source.path} has no {wanted[unknown[0]]}", None)
    by_theirs: dict[str, list[str]] = {}
    for name, other in wanted.items():
        by_theirs.setdefault(other, []).append(name)
    for other, tensor in source.tensors(by_theirs):
        for name in by_theirs[other]:
            shape, given = tuple(weights[name].shape), tuple(tensor.shape)
            if shape[1:] != given[1:] or shape[0] > given[0]:
                rule = (
                    f"{name} has shape {list(shape)}, the teacher's {other} {list(given)}: widths must agree"
                )
                raise JobError(field, how, rule, None)
            copy_rows(weights[name], tensor)


def _theirs(name: str, renamed: Mapping[str, str]) -> str:
    prefix = next((p for p in renamed if name.startswith(p)), "")
    return renamed[prefix] + name.removeprefix(prefix) if prefix else name
