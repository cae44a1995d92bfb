"""Settings that have no effect in a given job, as a table: field, when it counts, why it does not."""

from __future__ import annotations

from collections.abc import Callable

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import DEFAULT, Resolved

Rule = tuple[str, Callable[[Job], bool], str]

RULES: list[Rule] = [
    ("model.rotary_base", lambda j: j.model.positions == "rotary", "model.positions is not rotary"),
    ("model.max_positions", lambda j: j.model.positions == "learned", "only learned positions have a table"),
    ("data.tokenizer.vocab", lambda j: _trained(j), "the vocabulary is that of the given tokenizer"),
    ("data.tokenizer.train_bytes", lambda j: _trained(j), "no tokenizer is trained"),
    ("data.tokenizer.path", lambda j: j.data.tokenizer.kind != "bytes", "bytes need no tokenizer file"),
    ("optimizer.muon_lr", lambda j: j.optimizer.name == "muon", "optimizer.name is not muon"),
    ("optimizer.momentum", lambda j: j.optimizer.name == "muon", "optimizer.name is not muon"),
    ("schedule.decay", lambda j: j.schedule.name == "wsd", "only wsd has a decay phase of its own"),
    (
        "schedule.floor",
        lambda j: j.schedule.name in ("cosine", "linear", "wsd"),
        "this schedule has no floor",
    ),
    (
        "schedule.steps",
        lambda j: j.schedule.name in ("cosine", "linear", "wsd"),
        "this schedule does not depend on its length",
    ),
    ("train.eval_rows", lambda j: j.train.eval_every > 0, "train.eval_every is 0"),
    ("parallel.reshard", lambda j: j.parallel.shard != 1, "parallel.shard is 1: nothing is gathered"),
    ("tracking.project", lambda j: j.tracking.wandb != "off", "tracking.wandb is off"),
    ("tracking.group", lambda j: j.tracking.wandb != "off", "tracking.wandb is off"),
    ("tracking.tags", lambda j: j.tracking.wandb != "off", "tracking.wandb is off"),
    ("tracking.histograms_every", lambda j: j.tracking.wandb != "off", "tracking.wandb is off"),
]


def _trained(job: Job) -> bool:
    return job.data.tokenizer.kind == "sentencepiece" and job.data.tokenizer.path is None


def inert(resolved: Resolved) -> dict[str, str]:
    """Field -> reason, for every setting that was given and has no effect."""
    given = {f for f, origin in resolved.origins.items() if origin != DEFAULT}
    return {field: why for field, counts, why in RULES if field in given and not counts(resolved.job)}


def refuse_inert(resolved: Resolved) -> None:
    """Raise JobError if the command line sets something that has no effect."""
    for field, why in inert(resolved).items():
        if resolved.set_by_hand(field):
            raise JobError(
                field, "given on the command line", f"has no effect in this job: {why}", "leave it out"
            )
