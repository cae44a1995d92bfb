"""What each schedule asks of stages and micro-batches, and the refusal of jobs that cannot have it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from headway.kernels.attention.registry import mechanism
from headway.parallel.mesh import Layout, rows_per_micro_batch
from headway.pretrain.config import Job
from headway.pretrain.data.ramp import BatchSizes
from headway.pretrain.errors import JobError


class Kind(NamedTuple):
    """A schedule.

    Attributes:
        least: stages of a rank, at least.
        most: and at most.
        v_shaped: rank i holds stages i and 2p - 1 - i of p ranks, not every p-th one.
        splits: the backward of weights is apart from that of activations.
    """

    least: int = 1
    most: int = 1
    v_shaped: bool = False
    splits: bool = False


MANY = 1 << 20

SCHEDULES = {
    "gpipe": Kind(),
    "1f1b": Kind(),
    "interleaved_1f1b": Kind(2, MANY),
    "interleaved_zero_bubble": Kind(2, MANY, splits=True),
    "zbv": Kind(2, 2, v_shaped=True, splits=True),
    "dualpipev": Kind(2, 2, v_shaped=True, splits=True),
}


def kind_of(job: Job) -> Kind:
    """The schedule of a job."""
    return SCHEDULES[job.parallel.schedule]


def virtual_stages(job: Job) -> int:
    """Stages of a rank; what the schedule needs at least if the job does not say."""
    return job.parallel.virtual or kind_of(job).least


def splits_backward(job: Job, layout: Layout) -> bool:
    """Whether the backward runs in two passes, which compiled code cannot."""
    return layout.pipeline > 1 and kind_of(job).splits


def block_uses(job: Job) -> int:
    """Blocks that a row passes, in all towers; one that is used again counts again."""
    model = job.model
    more = model.decoder_depth if model.family == "t5" else 0
    return model.layers + more + (job.objective.mae.layers if job.objective.name == "mae" else 0)


def check(job: Job, layout: Layout) -> None:
    """Raise JobError where the job cannot run in this pipeline."""
    if layout.pipeline == 1:
        return
    name, kind, virtual = job.parallel.schedule, kind_of(job), virtual_stages(job)
    if not kind.least <= virtual <= kind.most:
        many = f"{kind.least} or more" if kind.most == MANY else f"exactly {kind.least}"
        rule = f"parallel.schedule {name} has {many} stages a rank"
        raise JobError("parallel.virtual", virtual, rule, max(kind.least, min(virtual, kind.most)))
    stages, blocks = layout.pipeline * virtual, block_uses(job)
    if blocks < stages:
        rule = (
            f"with {virtual} stage(s) a rank there are {stages} stages, and only {blocks} blocks to fill them"
        )
        raise JobError("parallel.pipeline", layout.pipeline, rule, max(1, blocks // virtual))
    for word in job.model.attention.mechanisms:
        if mechanism(word).drawn:
            rule = f"model.attention has {word!r}, and what it drew is not sent from stage to stage"
            raise JobError("parallel.pipeline", layout.pipeline, rule, 1)
    if job.model.init.lsuv:
        rule = "measures layer after layer in one process: not with parallel.pipeline above 1"
        raise JobError("model.init.lsuv", True, rule, False)
    if kind.splits and not _torch_splits():
        rule = f"splits the backward, which torch {torch.__version__} does wrongly for some models; torch 2.13 can"
        raise JobError("parallel.schedule", name, rule, "interleaved_1f1b")
    if job.train.compile is True and kind.splits:
        rule = f"compiled blocks have one backward, and parallel.schedule {name} splits it"
        raise JobError("train.compile", True, rule, "false, or parallel.schedule = interleaved_1f1b")
    micro_rows(job, layout)


def _torch_splits() -> bool:
    """Whether this torch computes the gradients of activations alone, also where some inputs take none."""
    from torch.distributed.pipelining import _backward

    return hasattr(_backward, "_autograd_grad_for_inputs")


def micro_rows(job: Job, layout: Layout) -> int:
    """Rows of a micro-batch on one rank.

    In a pipeline, if the job does not say: as many as leave four micro-batches a pipeline rank, so that a fifth of a
    step is idle at most under 1F1B (GPipe's advice, Huang et al. 2019), or as few as are possible.

    Raises:
        JobError: rows cannot be cut that way, or the schedule needs other numbers of micro-batches.
    """
    given = rows_per_micro_batch(job, layout.data)
    if layout.pipeline == 1:
        return given
    sizes = sorted({stage.rows // layout.data for stage in BatchSizes(job.train).stages})
    common = math.gcd(*sizes)
    fitting = [rows for rows in range(1, common + 1) if _fits(job, layout, sizes, rows)]
    if job.parallel.micro_batch is None:
        if not fitting:
            raise _refusal(job, layout, sizes)
        roomy = [rows for rows in fitting if sizes[-1] // rows >= 4 * layout.pipeline]
        return max(roomy) if roomy else min(fitting)
    if given not in fitting:
        counts = ", ".join(f"{size / given:g}" for size in sizes)
        nearest = min(fitting, key=lambda rows: abs(rows - given)) if fitting else None
        rule = f"gives {counts} micro-batch(es) a step; {_need(job, layout)}"
        raise JobError("parallel.micro_batch", given, rule, nearest)
    return given


def legal(schedule: str, count: int, ranks: int) -> bool:
    """Whether a schedule can do so many micro-batches."""
    if schedule == "1f1b":
        return count >= ranks
    if schedule.startswith("interleaved"):  # in equal rounds of as many as there are ranks, or a few more
        return count >= ranks and count % (count // ranks) == 0
    return count >= 2 * ranks if schedule == "dualpipev" else count >= 1


def _fits(job: Job, layout: Layout, sizes: list[int], rows: int) -> bool:
    return all(
        size % rows == 0 and legal(job.parallel.schedule, size // rows, layout.pipeline) for size in sizes
    )


def _need(job: Job, layout: Layout) -> str:
    name, ranks = job.parallel.schedule, layout.pipeline
    need = {
        "1f1b": f"at least {ranks}, one a rank",
        "dualpipev": f"at least {2 * ranks}, one a stage",
        "interleaved_1f1b": f"at least {ranks}, in equal rounds of {ranks} or little more",
        "interleaved_zero_bubble": f"at least {ranks}, in equal rounds of {ranks} or little more",
    }.get(name, "at least one")
    ramp = " of every size of the ramp" if job.train.ramp.start is not None else ""
    return f"parallel.schedule {name} over {ranks} ranks needs {need}, all of one size, in each global batch{ramp}"


def _refusal(job: Job, layout: Layout, sizes: list[int]) -> JobError:
    count = next(n for n in range(max(1, sizes[0]), MANY) if legal(job.parallel.schedule, n, layout.pipeline))
    field, value = (
        ("train.global_batch", job.train.global_batch)
        if job.train.ramp.start is None
        else ("train.ramp.start", job.train.ramp.start)
    )
    rule = f"{sizes[0]} row(s) a rank are too few: {_need(job, layout)}"
    return JobError(field, value, rule, count * layout.data)
