"""What each engine can do, as data, and the one check that refuses what it cannot."""

from __future__ import annotations

from dataclasses import dataclass

from headway.parallel import expert
from headway.parallel.context import rules as context
from headway.parallel.float8 import check_float8
from headway.parallel.mesh import AXES, Layout
from headway.parallel.pipeline.rules import check as check_pipeline
from headway.parallel.recompute.rules import check_recompute
from headway.parallel.tensor.legal import check_tensor
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


@dataclass(frozen=True)
class Capabilities:
    """Axes along which an engine spreads a model, precisions per device type."""

    axes: frozenset[str]
    precisions: dict[str, frozenset[str]]


ENGINES = {
    "native": Capabilities(
        axes=frozenset({"pipeline", "replicate", "shard", "context", "tensor", "expert"}),
        precisions={
            "cpu": frozenset({"auto", "fp32", "bf16", "fp16", "fp64"}),
            "cuda": frozenset({"auto", "fp32", "bf16", "fp16", "fp64", "fp8"}),
        },
    ),
}


def check(job: Job, layout: Layout, device_type: str) -> None:
    """Raise JobError if the job's engine cannot do what the job asks of it."""
    name = job.parallel.engine
    can = ENGINES[name]
    for axis in (*AXES, "expert"):
        size = getattr(layout, axis)
        if size != 1 and axis not in can.axes:
            rule = f"the {name} engine spreads along {', '.join(sorted(can.axes))} only"
            raise JobError(f"parallel.{axis}", size, rule, f"1, with parallel.shard = {size}")
    check_tensor(job, layout)
    expert.check(job, layout)
    check_pipeline(job, layout)
    context.check(job, layout)
    check_recompute(job, layout, device_type)
    check_float8(job, layout, device_type)
    legal = can.precisions.get(device_type, can.precisions["cpu"])
    if job.precision not in legal:
        raise JobError(
            "precision", job.precision, f"not on {device_type} with the {name} engine", sorted(legal)
        )
