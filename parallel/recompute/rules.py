"""Which settings of recomputation go together."""

from __future__ import annotations

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


def check_recompute(job: Job) -> None:
    """Raise JobError for a budget without its size, or for settings of another policy than the job's."""
    p = job.parallel
    if p.recompute == "budget" and p.recompute_budget is None:
        rule = "must be given with parallel.recompute = budget: GiB that a micro-batch's activations may take"
        raise JobError("parallel.recompute_budget", None, rule, 1.0)
    if p.recompute_budget is not None and p.recompute != "budget":
        rule = f"parallel.recompute = {p.recompute} keeps what it keeps: a size needs parallel.recompute = budget"
        raise JobError("parallel.recompute_budget", p.recompute_budget, rule, None)
    if p.recompute_every != 1 and p.recompute != "full":
        rule = f"counts whole blocks: needs parallel.recompute = full, not {p.recompute}"
        raise JobError("parallel.recompute_every", p.recompute_every, rule, 1)
    blocks = job.model.layers + (job.model.decoder_depth if job.model.family == "t5" else 0)
    if p.recompute_every > blocks:
        rule = f"of {blocks} blocks none would be computed again"
        raise JobError("parallel.recompute_every", p.recompute_every, rule, blocks)
