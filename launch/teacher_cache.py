"""A run's cached teacher: what a cache says that it was made from, and whether that is what a run needs.

The *identity* of a cache names the teacher, and all settings and data that decide which samples a run draws and what
a model reads of each. Rows of text are told apart by their content too: of some samples, evenly spaced, all whole
numbers that a batch has of them are hashed (pixels are not, whose last digits depend on the libraries that decode
and resize them; images are told by the names of their files).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from headway.launch.teacher_source import TeacherSource
from headway.parallel.distill.cached import CachedTeacher
from headway.parallel.distill.record import everything, names_of
from headway.parallel.distill.student import Seats, check_layout
from headway.parallel.engines.base import BaseEngine
from headway.pretrain.config import Job, Model
from headway.pretrain.data.dataset import Dataset
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.samples import make_keys
from headway.pretrain.data.teacher_cache import TeacherCache
from headway.pretrain.errors import DataError, JobError
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.distill.attach import TeacherShape
from headway.pretrain.objectives.distill.distillation import Wanted

FIELD = "objective.distill"
TEACHER, SHAPE, PRECISION = f"{FIELD}.teacher", "teacher_shape", f"{FIELD}.precision"
SOFT = f"{FIELD}.logits.temperature", f"{FIELD}.logits.top_k"
CORRUPTION = ("name", "infill", "masking", "spans", "denoisers", "augment")
"""Settings of an objective that decide what a model reads of a sample."""
PROBED = 32
"""Samples of a source that are hashed."""
OF_TERM = {"final": "logits", "logits": "logits", "words": "logits", "rest": "logits", "last": "final",
           "others": "contrast", "inputs": "states", "states": "states", "queries": "relations", "keys": "relations",
           "values": "relations"}  # fmt: skip
"""How names of what a teacher gives end -> the part of the loss that wants it; attention maps are the rest."""


def identity_of(job: Job, dataset: Dataset, objective: Objective) -> dict[str, Any]:
    """Settings and data on which a cache depends, as JSON values; what is about the teacher is not among them.

    Args:
        job: the student's.
        dataset: of it.
        objective: of it, on any device.
    """
    data, settings = job.data.model_dump(mode="json"), job.objective.model_dump(mode="json")
    sources = [
        {"name": name, "weight": weight, "samples": len(samples), **samples.identity}
        for name, samples, weight in dataset.train
    ]
    fields = ("images",) if job.model.family == "vit" else ("seq_len", "target_len", "documents")
    found = {
        "data.tokenizer": dataset.tokenizer.digest if dataset.tokenizer else None,
        "data.sources": sources,
    }
    found |= {"train.seed": job.train.seed} | {f"data.{name}": data[name] for name in fields}
    found |= {f"objective.{name}": settings[name] for name in CORRUPTION}
    return found | {"data_fingerprint": fingerprint(job, dataset, objective)}


def identity_of_teacher(
    source: TeacherSource, shape: TeacherShape, job: Job, precision: str
) -> dict[str, Any]:
    """What the identity of a cache says beside.

    Args:
        source: the teacher.
        shape: of it.
        job: the student's.
        precision: in which the teacher computes.
    """
    logits = job.objective.distill.logits
    told = shape._asdict() | {"model": shape.model.model_dump(mode="json")}
    soft = dict(zip(SOFT, (logits.temperature, logits.top_k), strict=True))
    return {TEACHER: source.digest, PRECISION: precision, SHAPE: told} | soft


def fingerprint(job: Job, dataset: Dataset, objective: Objective) -> str:
    """Hash of whole numbers that batches have of some samples of every source."""
    found = hashlib.sha256()
    for name, samples, _ in dataset.train:
        numbers = np.unique(np.linspace(0, len(samples) - 1, PROBED).astype(np.int64))
        keys = make_keys(name, job.train.seed, numbers.tolist(), [0] * len(numbers))
        rows = {**samples.rows(numbers, keys), "sample": numbers, "key": keys}
        batch = objective.collate(rows)
        for field in sorted(batch):
            if not batch[field].is_floating_point():
                found.update(f"{name} {field} {list(batch[field].shape)}".encode())
                found.update(np.ascontiguousarray(batch[field].numpy().astype("<i8")).tobytes())
    return found.hexdigest()


def open_cache(job: Job, source: TeacherSource | None) -> TeacherCache | None:
    """The cache of a job, which is of its teacher if it names one; None if it has no cache.

    Raises:
        JobError: there is none, it is another teacher's, or the run needs weights of a teacher that it does not name.
    """
    settings = job.objective.distill
    if settings.cache is None or not settings.on:
        return None
    if apart := job.parallel.teacher.ranks:
        rule = "a cache needs no ranks that are a teacher's alone"
        raise JobError("parallel.teacher.ranks", apart, rule, 0)
    try:
        cache = TeacherCache.open(settings.cache)
    except DataError as fault:
        rule = f"no cache can be read there: {fault}"
        raise JobError(f"{FIELD}.cache", settings.cache, rule, "what `headway distill cache` wrote") from None
    if SHAPE not in cache.identity:
        rule = f"was not written by `headway distill cache`: it does not say what its teacher is ({SHAPE})"
        raise JobError(f"{FIELD}.cache", settings.cache, rule)
    if source is not None:
        cache.check(cache.identity | {TEACHER: source.digest})
    elif settings.init is not None:
        rule = (
            f"takes a teacher's weights, which a cache does not hold: name it, as {TEACHER}, beside the cache"
        )
        raise JobError(f"{FIELD}.init", settings.init, rule)
    elif settings.logits.weight and settings.logits.top_k is None and job.objective.name != "classify":
        rule = (
            "soft targets of all words are read by the teacher's head, which a cache does not hold: name the "
            f"teacher, as {TEACHER}, beside the cache, or cache its likeliest words"
        )
        raise JobError(f"{FIELD}.logits.top_k", None, rule, 64)
    return cache


def shape_in(cache: TeacherCache) -> TeacherShape:
    """The shape of the teacher of a cache."""
    told = cache.identity[SHAPE]
    return TeacherShape(**{**told, "model": Model.model_validate(told["model"])})


def check_cache(cache: TeacherCache, job: Job, dataset: Dataset, objective: Objective) -> None:
    """Raise JobError if a cache is of other data or settings than a run's, or lacks something that its steps want."""
    assert objective.distillation is not None
    wanted, logits = everything(objective.distillation), job.objective.distill.logits
    ours = identity_of(job, dataset, objective)
    if wanted.top is not None:
        ours |= dict(zip(SOFT, (logits.temperature, logits.top_k), strict=True))
    cache.check(cache.identity | ours)
    check_fields(cache, job, wanted)
    sizes, steps = BatchSizes(job.train), job.train.steps
    if sizes.first(steps) > len(cache):
        rule = (
            f"draws {sizes.first(steps):,} samples, and the cache {cache.folder} has the first {len(cache):,}"
        )
        raise JobError("train.steps", steps, rule, sizes.step_of(len(cache)))


def check_fields(cache: TeacherCache, job: Job, wanted: Wanted) -> None:
    """Raise JobError if a cache lacks something that a run's steps want."""
    for name in names_of(wanted):
        if name in cache.fields or name.endswith(".bias"):  # not all teachers have biases of scores
            continue
        end = name.rpartition(".")[2]
        terms = job.objective.distill.terms
        term = OF_TERM.get(end, "attention" if "attention" in terms else "rows")
        rule = (
            f"needs {name}, which the cache {cache.folder} does not have (it has {', '.join(cache.fields)})"
        )
        raise JobError(
            f"{FIELD}.{term}", f"weight {terms[term].weight:g}", f"{rule}: make it anew, for this job"
        )


def read_beside(cache: TeacherCache, engine: BaseEngine) -> CachedTeacher:
    """Put a cache beside a student's engine.

    Raises:
        JobError: the student's layout does not suit what it learns.
    """
    job, world, model = engine.job, engine.world, shape_in(cache).model
    check_layout(job, model, world.layout)
    assert engine.objective.distillation is not None
    plan = engine.pipeline.plan if engine.pipeline else None
    seats = Seats(job, model, world.layout, engine.objective.distillation, plan)
    return CachedTeacher(cache, seats, world, engine.precision)
