"""A teacher is put beside a student's engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor

from headway.parallel import mesh
from headway.parallel.checkpoint.boxes import Box
from headway.parallel.checkpoint.layout import held
from headway.parallel.distill.student import Seats, check_layout
from headway.parallel.distill.teacher import LiveTeacher
from headway.parallel.distill.teaching import freeze
from headway.parallel.engines import capabilities
from headway.parallel.engines.native import AUTOCAST, NativeEngine, persistent_buffers
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job, Parallel
from headway.pretrain.objectives import Objective

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}


def lay_out(job: Job, ours: Layout, ranks: int) -> Layout:
    """The teacher's layout over the run's ranks.

    Args:
        job: the student's.
        ours: the student's layout.
        ranks: of the run.

    Raises:
        JobError: the axes do not make up the ranks.
    """
    wanted = job.parallel.teacher
    tensor, context = wanted.tensor or ours.tensor, wanted.context or ours.context
    axes = Parallel(tensor=tensor, context=context, replicate=wanted.replicate, shard=wanted.shard)
    return mesh.lay_out(axes, ranks)


def hire(
    engine: NativeEngine,
    theirs: Job,
    objective: Objective,
    fill: Callable[[Mapping[str, Tensor]], None],
) -> LiveTeacher:
    """Spread a teacher over the ranks of a student's engine and give it its weights. Collective.

    Args:
        engine: of the student.
        theirs: the teacher's job; its precision is that of its weights and products.
        objective: the teacher, built on the meta device.
        fill: writes weights, given by canonical name, in fp32 (fp64 for fp64), each where it is spread.

    Raises:
        JobError: a layout that does not suit the teacher, or what the student learns.
    """
    job, world = engine.job, engine.world
    layout = lay_out(job, world.layout, world.size)
    capabilities.check(theirs, layout, world.device.type)
    check_layout(job, theirs.model, world.layout)
    beside = world if layout == world.layout else mesh.beside(world, layout)
    teaching = freeze(objective, theirs, beside, job.objective.distill.logits.temperature)
    fill({name: p.detach() for name, p in objective.named_parameters()} | persistent_buffers(objective))
    precision = theirs.precision
    teaching.to(DTYPES[precision])
    distillation = engine.objective.distillation
    assert distillation is not None
    plan = engine.pipeline.plan if engine.pipeline else None
    seats = Seats(job, theirs.model, world.layout, distillation, plan)
    narrow = AUTOCAST.get(precision)
    autocast = partial(torch.autocast, world.device.type, narrow) if narrow else nullcontext
    return LiveTeacher(teaching, theirs.model, distillation, seats, beside, autocast)


@torch.no_grad()
def copy_rows(parameter: Tensor, tensor: Tensor) -> None:
    """Fill the parts of a tensor that are here from a whole one, which may have more rows."""
    for part in held({"": parameter}):
        part.view.copy_(tensor[part.box.within(Box.whole(tuple(tensor.shape)))])
