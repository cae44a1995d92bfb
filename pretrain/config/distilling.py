"""Rules of distillation that a job alone can break; what a pair of models can is in `objectives.distill.lessons`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.pretrain.errors import JobError

if TYPE_CHECKING:
    from headway.pretrain.config import Job
    from headway.pretrain.config.distill import Distill

FIELD = "objective.distill"


def check_distill(job: Job) -> None:
    """There is a teacher where something is learned, something is learned where there is a teacher, and the objective
    can learn it."""
    settings = job.objective.distill
    if not settings.on:
        if settings.enabled:
            _check_nothing(settings)
        return
    if job.objective.name == "mae":
        rule = "learns from no teacher, whose patches would be hidden as its own are"
        raise JobError("objective.name", "mae", rule, "classify")
    if not settings.terms and settings.init is None:
        rule = (
            f"with a teacher or a cache, something is learned: {FIELD}.logits.weight, .attention.weight ..."
        )
        raise JobError(f"{FIELD}.logits.weight", settings.logits.weight, rule, 1.0)
    if not settings.terms and not settings.task:
        rule = "without a part of the loss that has a weight, the loss would be 0"
        raise JobError(f"{FIELD}.task", settings.task, rule, 1.0)
    _check_beginning(job)
    _check_windows(settings)
    if settings.logits.hard and job.objective.name != "classify":
        rule = (
            f"the teacher's likeliest class is a label of classifiers, not of objective {job.objective.name}"
        )
        raise JobError(f"{FIELD}.logits.hard", True, rule, False)


def _check_nothing(settings: Distill) -> None:
    """Without a teacher nothing is learned from one."""
    learned = [f"{FIELD}.{name}.weight" for name in settings.terms]
    learned += [] if settings.init is None else [f"{FIELD}.init"]
    if learned:
        rule = f"there is neither a teacher nor a cache of one ({FIELD}.cache) for {', '.join(learned)}"
        raise JobError(f"{FIELD}.teacher", None, rule, "a run, a checkpoint, or a folder of Hugging Face")


def _check_beginning(job: Job) -> None:
    """First weights come from one place, which has some."""
    how, start = job.objective.distill.init, job.train.start_from
    if how is None:
        return
    if job.objective.distill.teacher is None:
        rule = f"weights are those of {FIELD}.teacher, which is not given; a cache has none"
        raise JobError(f"{FIELD}.init", how, rule)
    if start is not None:
        rule = f"a run begins with weights of its teacher ({FIELD}.init) or with these, not with both"
        raise JobError("train.start_from", start, rule)


def _check_windows(settings: Distill) -> None:
    for name, term in settings.terms.items():
        if term.end is not None and term.end <= term.begin:
            rule = f"no step has this part of the loss: must exceed {FIELD}.{name}.begin = {term.begin}"
            raise JobError(f"{FIELD}.{name}.end", term.end, rule, term.begin + 1)
