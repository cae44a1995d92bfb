"""A teacher is put beside a student's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel import mesh
from headway.parallel.checkpoint.boxes import Box
from headway.parallel.checkpoint.layout import held
from headway.parallel.distill.apart import FarTeacher
from headway.parallel.distill.apart import serve as answer
from headway.parallel.distill.routes import Routes
from headway.parallel.distill.student import Seats, check_layout
from headway.parallel.distill.teacher import LiveTeacher
from headway.parallel.distill.teaching import Teaching, freeze
from headway.parallel.engines import capabilities
from headway.parallel.engines.base import AUTOCAST, BaseEngine, persistent_buffers
from headway.parallel.mesh import Layout, World
from headway.parallel.pipeline.messages import Messages
from headway.parallel.pipeline.plan import Plan, make_plan
from headway.pretrain.config import Job
from headway.pretrain.objectives import Objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


Fill = Callable[[Mapping[str, Tensor]], None]
"""Writes weights, given by canonical name, in fp32 (fp64 for fp64), each where it is spread."""
Autocast = Callable[[], AbstractContextManager]


def hire(engine: BaseEngine, theirs: Job, objective: Objective, fill: Fill) -> LiveTeacher | FarTeacher:
    """Put a teacher beside a student's engine: on its ranks, with its weights; or on others, which `serve`. Collective.

    Args:
        engine: of the student.
        theirs: the teacher's job; its precision is that of its weights and products.
        objective: the teacher, built on the meta device.
        fill: see `Fill`.

    Raises:
        JobError: a layout that does not suit the teacher, or what the student learns.
    """
    job, world = engine.job, engine.world
    plan = engine.pipeline.plan if engine.pipeline else None
    seats = seats_of(job, engine.objective, theirs, world.layout, plan)
    if not (apart := mesh.apart(job)):
        return spread_beside(seats, world, theirs, objective, fill)
    layout = mesh.lay_out_teacher(job.parallel, world.layout, apart)
    routes = Routes(seats, theirs.model, seats.distillation, layout, world.rank, apart=True)
    return FarTeacher(routes, world, _messages(world))


def spread_beside(seats: Seats, world: World, theirs: Job, objective: Objective, fill: Fill) -> LiveTeacher:
    """Put a teacher on the ranks of those who ask it. Collective.

    Args:
        seats: what each rank asks.
        world: of those who ask.
        theirs, objective, fill: see `hire`.
    """
    layout = mesh.lay_out_teacher(seats.job.parallel, world.layout, world.size)
    routes = Routes(seats, theirs.model, seats.distillation, layout, world.rank, apart=False)
    beside = world if layout == world.layout else mesh.beside(world, layout)
    teaching, autocast = spread(seats.job, theirs, objective, beside, fill)
    return LiveTeacher(teaching, routes, world, autocast)


def serve(job: Job, student: Objective, theirs: Job, objective: Objective, world: World, fill: Fill) -> None:
    """Be the teacher of a student on other ranks, until it is done. Collective.

    Args:
        job: the student's.
        student: built on the meta device.
        theirs, objective, fill: see `hire`.
        world: of the teacher's ranks.
    """
    apart = mesh.apart(job)
    layout = mesh.lay_out(job.parallel, dist.get_world_size() - apart)
    plan = make_plan(student, job, layout) if layout.pipeline > 1 else None
    seats = seats_of(job, student, theirs, layout, plan)
    routes = Routes(seats, theirs.model, seats.distillation, world.layout, dist.get_rank(), apart=True)
    teaching, autocast = spread(job, theirs, objective, world, fill)
    answer(teaching, routes, world, _messages(world), autocast)


def seats_of(job: Job, student: Objective, theirs: Job, layout: Layout, plan: Plan | None) -> Seats:
    """What a student's ranks need; raises JobError where its layout does not suit what it learns."""
    check_layout(job, theirs.model, layout)
    assert student.distillation is not None
    return Seats(job, theirs.model, layout, student.distillation, plan)


def spread(
    job: Job, theirs: Job, objective: Objective, world: World, fill: Fill
) -> tuple[Teaching, Autocast]:
    """A teacher over its ranks, with its weights, and the context of its forward."""
    capabilities.check(theirs, world.layout, world.device.type)
    teaching = freeze(objective, theirs, world, job.objective.distill.logits.temperature)
    fill({name: p.detach() for name, p in objective.named_parameters()} | persistent_buffers(objective))
    teaching.to(DTYPES[theirs.precision])
    narrow = AUTOCAST.get(theirs.precision)
    return teaching, partial(torch.autocast, world.device.type, narrow) if narrow else nullcontext


def _messages(world: World) -> Messages:
    assert world.between is not None, "both sides have met"
    return Messages(world.between, torch.device("cpu"))


@torch.no_grad()
def copy_rows(parameter: Tensor, tensor: Tensor) -> None:
    """Fill the parts of a tensor that are here from a whole one, which may have more rows."""
    for part in held({"": parameter}):
        part.view.copy_(tensor[part.box.within(Box.whole(tuple(tensor.shape)))])
