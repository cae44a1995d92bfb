"""What each engine can do, as data, and the one check that refuses what it cannot."""

from __future__ import annotations

from collections.abc import Mapping

from headway.parallel import expert
from headway.parallel.context import rules as context
from headway.parallel.engines.can import deepspeed, megatron, native
from headway.parallel.engines.can.cell import Cell
from headway.parallel.engines.deepspeed.merge import configure
from headway.parallel.engines.features import DEEPSPEED_ONLY, FEATURES, Asked
from headway.parallel.float8 import check_float8
from headway.parallel.mesh import Layout
from headway.parallel.pipeline.rules import check as check_pipeline
from headway.parallel.recompute.rules import check_recompute
from headway.parallel.tensor.legal import check_tensor
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError

ENGINES: dict[str, Mapping[str, Cell]] = {
    "native": native.CAN,
    "deepspeed": deepspeed.CAN,
    "megatron": megatron.CAN,
}
"""Engine -> feature -> what is known of it."""


def check(job: Job, layout: Layout, device_type: str) -> None:
    """Raise JobError if the job's engine cannot do what the job asks of it."""
    check_float8(job, layout, device_type)
    check_features(job, layout, device_type)
    if job.parallel.engine == "deepspeed":
        configure(job, layout, job.precision if job.precision != "auto" else "fp32", device_type)
    if job.parallel.engine == "megatron":
        megatron.check(job, layout)
    check_tensor(job, layout)
    expert.check(job, layout)
    check_pipeline(job, layout)
    context.check(job, layout)
    check_recompute(job, layout, device_type)


def check_features(job: Job, layout: Layout, device_type: str) -> None:
    """Raise JobError, which names the engines that can, for the first feature that the job's engine refuses."""
    name = job.parallel.engine
    asked = features_of(job, layout, device_type)
    for feature, how in asked.items():
        cell = ENGINES[name][feature]
        if cell.status == "refused":
            others = [other for other in ENGINES if all(ENGINES[other][f].status != "refused" for f in asked)]
            rule = f"the {name} engine refuses {feature}: {cell.why}"
            raise JobError(how.field, how.value, rule, _nearest(how, others))


def features_of(job: Job, layout: Layout, device_type: str) -> dict[str, Asked]:
    """What a job asks of its engine, and how."""
    found = {}
    for feature, ask in FEATURES.items():
        if feature in DEEPSPEED_ONLY and job.parallel.engine != "deepspeed":
            continue
        if (how := ask(job, layout, device_type)) is not None:
            found[feature] = how
    return found


def _nearest(how: Asked, others: list[str]) -> str | None:
    """Another engine that can do all that is asked, or another value."""
    choices = [f"parallel.engine = {other}" for other in others]
    if how.nearest is not None:
        choices.append(f"{how.field} = {how.nearest}")
    return ", or ".join(choices) or None
