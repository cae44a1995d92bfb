"""The proof of a layout: some steps of a case, on some ranks, beside the same steps in one process.

    prove(pool, ["t5"], {"tensor": 2, "shard": 2})

holds every step's loss, gradient norm and metrics, and the whole state after the last step, to those of one process in
fp64, with dropout and clipping on. How far they were apart is kept in DEVIATIONS and told at the end of the tests.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from headway.parallel import mesh
from headway.parallel.checkpoint.layout import held
from headway.parallel.distill.apart import FarTeacher
from headway.parallel.distill.cached import CachedTeacher
from headway.parallel.distill.hire import copy_rows, hire, serve
from headway.parallel.distill.student import Seats
from headway.parallel.distill.teacher import Teacher
from headway.parallel.engines.base import BaseEngine
from headway.parallel.engines.build import build_engine
from headway.pretrain.config import Job
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.data.stream import SampleStream
from headway.pretrain.data.teacher_cache import TeacherCache
from headway.pretrain.engine import StepResult
from headway.pretrain.objectives.distill.attach import TeacherShape
from headway.tests.parallel.distill_cases import TEACHERS
from headway.tests.parallel.family_cases import LENGTH, SPECIALS, Tree, build, job_of

STEPS, ROWS = 4, 12


Part = tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray]
"""A part of a tensor: its name, where the part begins in every dim of the whole, where it ends, its values."""


class Curve(NamedTuple):
    """What some steps of a case gave on a rank; `parts` are what it holds of the state after them."""

    losses: list[float]
    norms: list[float]
    metrics: list[dict[str, np.ndarray]]
    parts: list[Part]


class Running:
    """A case under way on one rank."""

    def __init__(
        self,
        name: str,
        rank: int,
        world: int,
        parallel: Tree,
        more: Tree | None = None,
        steps: int = STEPS,
        precision: str = "fp64",
        compiled: bool = False,
        device: str = "cpu",
        cache: str | None = None,
    ) -> None:
        self.job = job_of(name, parallel, steps, ROWS, more, precision)
        self.here = join(self.job, rank, world, device)
        taught = name in TEACHERS
        self.objective, samples = build(self.job, teacher=shape_of_teacher(name) if taught else None)
        if self.here.teaches:
            return
        self.engine = build_engine(
            self.job, self.objective, self.here, precision=precision, compiled=compiled
        )
        if cache:
            self.engine.teacher = cached_teacher(name, self.engine, cache)
        elif taught:
            self.engine.teacher = hire_teacher(name, self.engine)
        self.stream = SampleStream([("memory", samples, 1.0)], seed=0)
        self.sizes = BatchSizes(self.job.train)

    def step(self, number: int) -> StepResult:
        first, rows = self.sizes.first(number), self.sizes.rows(number)
        batch = self.stream.batch(first, rows, self.here.data_rank, self.here.layout.data)
        collated = self.objective.collate(batch) | {"key": torch.from_numpy(batch["key"])}
        tensors = {key: value.to(self.here.device) for key, value in collated.items()}
        return self.engine.train_step(tensors, number)

    def parts(self) -> list[Part]:
        """What this rank holds: of parameters, buffers, averages, moments."""
        return [
            (part.name, part.box.offset, part.box.stop, part.view.double().cpu().clone().numpy())
            for part in held(self.engine.state().tensors)
        ]

    def whole(self) -> dict[str, np.ndarray]:
        """All tensors of the state, whole: parameters, buffers, averages, moments."""
        tensors = self.engine.state().tensors
        return {
            n: (t.full_tensor() if isinstance(t, DTensor) else t).double().cpu().clone().numpy()
            for n, t in tensors.items()
        }


def teacher_job(name: str, precision: str = "fp64") -> Job:
    """The teacher of a student."""
    tree = {"data": {}, "objective": {}} | TEACHERS[name]
    tree["data"] = {"seq_len": LENGTH, "tokenizer": {"kind": "bytes"}} | tree["data"]
    return Job.model_validate(tree | {"train": {"seed": 7}, "precision": precision})


def shape_of_teacher(name: str) -> TeacherShape:
    job = teacher_job(name)
    words = 0 if job.model.family == "vit" else SPECIALS.vocab
    return TeacherShape(job.model, words, job.model.hidden, job.model.family == "bert", 5)


def hire_teacher(name: str, engine: BaseEngine) -> Teacher:
    """The teacher beside an engine, with its initial weights; the student's copy of its head as it is."""
    job = teacher_job(name, engine.precision)
    teacher = hire(engine, job, build(job)[0], lambda weights: None)
    give_head(job, engine)
    return teacher


def cached_teacher(name: str, engine: BaseEngine, cache: str) -> CachedTeacher:
    """What a teacher gave before, in its stead."""
    job = teacher_job(name, engine.precision)
    give_head(job, engine)
    plan = engine.pipeline.plan if engine.pipeline else None
    seats = Seats(engine.job, job.model, engine.world.layout, engine.objective.distillation, plan)
    return CachedTeacher(TeacherCache.open(cache), seats, engine.world, engine.precision)


def give_head(job: Job, engine: BaseEngine) -> None:
    """Fill a student's copy of its teacher's head."""
    distillation = engine.objective.distillation
    if distillation.head is not None and distillation.head.weight is not None:
        whole = build(job, "cpu")[0]
        copy_rows(dict(distillation.named_parameters())["head.weight"], whole.head_weight.detach())
        if whole.head_bias is not None:
            copy_rows(dict(distillation.named_parameters())["head.bias"], whole.head_bias.detach())


def join(job: Job, rank: int, world: int, device: str = "cpu") -> mesh.World:
    """This rank's place in the job's layout; cases of one call that are laid out alike share their groups, for each
    group of gloo has threads of its own, which wake a hundred times a second."""
    layout = mesh.lay_out(job.parallel, world - mesh.apart(job))
    apart = str(job.parallel.teacher) if mesh.apart(job) else ""
    key = layout, apart, device, dist.group.WORLD if world > 1 else None
    if _joined.get("key") != key:
        backend = "gloo" if device == "cpu" else "nccl"
        here = mesh.start(job, layout, rank, world, rank, torch.device(device), backend)
        _joined.update(key=key, here=here)
    return _joined["here"]


_joined: dict[str, Any] = {}


def curves(
    rank: int,
    world: int,
    parallel: Tree,
    names: list[str],
    steps: int = STEPS,
    caches: dict[str, str] | None = None,
    **settings: Any,
) -> dict[str, tuple[Any, ...]]:
    """Name -> the fields of the `Curve` of some steps at a layout; `settings` are those of `Running`."""
    found: dict[str, tuple[Any, ...]] = {}
    for name in names:
        cache = (caches or {}).get(name)
        running = Running(name, rank, world, parallel, steps=steps, cache=cache, **settings)
        if running.here.teaches:
            theirs = teacher_job(name, str(running.job.precision))
            serve(
                running.job, running.objective, theirs, build(theirs)[0], running.here, lambda weights: None
            )
            continue
        results = [running.step(step) for step in range(steps)]
        metrics = [{k: np.array(v) for k, v in r.metrics.items()} for r in results]
        losses, norms = [r.loss for r in results], [r.grad_norm for r in results]
        found[name] = (
            losses,
            norms,
            metrics,
            running.parts(),
        )  # plain things, which go from process to process
        if isinstance(running.engine.teacher, FarTeacher):
            running.engine.teacher.close()
    return found


def alone(name: str, more: Tree | None = None, steps: int = STEPS, precision: str = "fp64") -> Curve:
    """The curve of the native engine in one process; each is computed once."""
    return _alone(name, json.dumps(more or {}), steps, precision)


@cache
def _alone(name: str, more: str, steps: int, precision: str) -> Curve:
    return Curve(*curves(0, 1, {}, [name], steps, more=json.loads(more), precision=precision)[name])


# -- comparing -------------------------------------------------------------------------------------------------


class Bound(NamedTuple):
    """Largest relative deviation of a loss and of a gradient norm; of a parameter, beside an absolute one of 1e-10."""

    loss: float
    norm: float
    parameter: float | None = None


BOUNDS = {
    "fp64": Bound(
        1e-9, 1e-9, 1e-8
    ),  # sums in another order: 1e-16 a step, grown by the steps of a small network
    "fp32": Bound(1e-5, 2e-4),
    "bf16": Bound(
        1e-2, 2e-1
    ),  # products err by 2^-9 relative, and a mean of losses by less; a norm is no mean
    "fp16": Bound(1e-2, 2e-1),
    "fp8": Bound(2e-2, 3e-1),  # 3 bits of mantissa: products err by 2^-4
}


class Deviation(NamedTuple):
    """How far a case at a layout was from one process: relative for losses and norms, absolute for the state."""

    precision: str
    layout: str
    name: str
    loss: float
    norm: float
    state: float


DEVIATIONS: list[Deviation] = []


def prove(
    pool: Any,
    names: list[str],
    parallel: Tree,
    more: Tree | None = None,
    steps: int = STEPS,
    precision: str = "fp64",
    device: str = "cpu",
    caches: dict[str, str] | None = None,
) -> None:
    """Assert that every rank of a layout draws the curves of one process, which computes on the CPU.

    `caches` are folders by name of a case, which are read there; the one process has a teacher beside it."""
    settings = {"more": more, "steps": steps, "precision": precision, "device": device}
    settings |= {"caches": caches} if caches else {}
    found = pool(curves, ranks=ranks_of(parallel), timeout=600, parallel=parallel, names=names, **settings)
    for name in names:
        expected = alone(name, more, steps)
        each = [Curve(*rank[name]) for rank in found if name in rank]
        note(precision, parallel, name, each, expected)
        for one in each:
            compare(name, one, expected, precision)
        if precision == "fp64":
            hold_together(each, expected)


def ranks_of(parallel: Tree) -> int:
    """Ranks of a layout whose axes are all given."""
    return prod(parallel.get(axis, 1) for axis in mesh.AXES) + parallel.get("teacher", {}).get("ranks", 0)


def compare(name: str, found: Curve, expected: Curve, precision: str = "fp64") -> None:
    """Assert that a curve is another; of a rank of a pipeline, that what it holds of the state is right."""
    bound = BOUNDS[precision]
    np.testing.assert_allclose(found.losses, expected.losses, rtol=bound.loss, err_msg=name)
    np.testing.assert_allclose(found.norms, expected.norms, rtol=bound.norm, err_msg=name)
    if bound.parameter is None:
        return
    for step, (ours, theirs) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        assert ours.keys() == theirs.keys(), name
        for key, value in theirs.items():
            np.testing.assert_allclose(
                ours[key], value, rtol=1e-9, atol=1e-12, err_msg=f"{name} {key} {step}"
            )
    whole = whole_of(expected)
    for key, start, stop, values in found.parts:
        theirs = whole[key][tuple(map(slice, start, stop))]
        np.testing.assert_allclose(values, theirs, rtol=bound.parameter, atol=1e-10, err_msg=f"{name} {key}")


def whole_of(curve: Curve) -> dict[str, np.ndarray]:
    """The state of a curve of one process, by name."""
    return {name: values for name, _, _, values in curve.parts}


def hold_together(each: list[Curve], expected: Curve) -> None:
    """Together ranks have the whole state, and copies of a part are the same bits."""
    bits: dict[Any, set[bytes]] = defaultdict(set)
    covered = {name: np.zeros_like(values, dtype=bool) for name, values in whole_of(expected).items()}
    for name, start, stop, values in (part for rank in each for part in rank.parts):
        bits[name, start, stop].add(values.tobytes())
        covered[name][tuple(map(slice, start, stop))] = True
    assert not [name for name, elements in covered.items() if not elements.all()]
    assert not [where for where, copies in bits.items() if len(copies) > 1]


def note(precision: str, parallel: Tree, name: str, each: list[Curve], expected: Curve) -> None:
    def relative(ours: list[float], theirs: list[float]) -> float:
        return float(np.max(np.abs(np.array(ours) / theirs - 1)))

    whole = whole_of(expected)
    layout = ", ".join(f"{k} {v}" for k, v in sorted(parallel.items()) if k != "micro_batch" and v != 1)
    DEVIATIONS.append(
        Deviation(
            precision,
            layout or "one process",
            name,
            max(relative(rank.losses, expected.losses) for rank in each),
            max(relative(rank.norms, expected.norms) for rank in each),
            max(
                float(np.max(np.abs(values - whole[key][tuple(map(slice, start, stop))]), initial=0))
                for rank in each
                for key, start, stop, values in rank.parts
            ),
        )
    )


def summary() -> list[str]:
    """A line for each precision: layouts and curves proved, and the worst deviations."""
    lines = []
    for precision in BOUNDS:
        found = [d for d in DEVIATIONS if d.precision == precision]
        if found:
            layouts = len({d.layout for d in found})
            text = f"{precision}: {len(found)} curves at {layouts} layouts; worst deviation"
            for what in ("loss", "norm", "state"):
                worst = max(found, key=lambda d: getattr(d, what))
                text += f" of {what} {getattr(worst, what):.1e} ({worst.name}; {worst.layout}),"
            lines.append(text.rstrip(","))
    return lines
