"""An objective learns from a teacher: taps in its blocks, a `Distillation` beside its head."""

from __future__ import annotations

from typing import NamedTuple

from headway.pretrain.config import Job, Model
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives.base import Objective
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill.distillation import Distillation
from headway.pretrain.objectives.soft_classes import SoftClasses


class TeacherShape(NamedTuple):
    """What a student must know of its teacher before it is built.

    Attributes:
        model: its config.
        vocab: rows of its head; 0 of a classifier or a model without a head.
        head_width: what they multiply.
        head_bias: whether the head has a bias.
        classes: of a classifier.
    """

    model: Model
    vocab: int = 0
    head_width: int = 0
    head_bias: bool = False
    classes: int = 0


def learn_from(objective: Objective, job: Job, inputs: Inputs, teacher: TeacherShape) -> None:
    """Let an objective learn from a teacher, as `objective.distill` says; before it is initialised.

    Raises:
        JobError: the two do not fit.
    """
    distillation = Distillation(
        job, inputs, teacher.model, (teacher.head_width, inputs.vocab, teacher.head_bias)
    )
    objective.distillation = distillation
    distillation.attach(objective, job.model, teacher.model)
    loss = getattr(objective, "loss", None)
    if loss is not None and job.objective.distill.logits.weight:
        loss.soft = distillation.soft()
    if isinstance(objective, Classifier):
        logits = job.objective.distill.logits
        shares = logits.weight, logits.divergence, job.objective.distill.task
        objective.soft = SoftClasses(logits.hard, logits.temperature, *shares) if logits.weight else None
        if distillation.reads_places:
            objective.outputs = None
