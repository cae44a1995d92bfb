"""Distillation: any objective, with a teacher.

An objective that learns from a teacher is itself, with taps in its blocks and a `Distillation` beside its head. What the
teacher gives for a row stands in the batch, under names that begin with `taught.`, whoever put it there: a teacher that
computes beside the student, or a cache of what it gave before. So the model is one for one device, and everything that
spreads an objective spreads this.
"""

from __future__ import annotations

from typing import NamedTuple

from headway.pretrain.config import Job, Model
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives.base import Objective
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill.distillation import Distillation

__all__ = ["Distillation", "TeacherShape", "learn_from"]


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
    distillation = Distillation(job, inputs, teacher.model, (teacher.head_width, inputs.vocab, teacher.head_bias))
    objective.distillation = distillation
    distillation.attach(objective, job.model, teacher.model)
    loss = getattr(objective, "loss", None)
    if loss is not None:
        loss.soft = distillation.soft()
    if isinstance(objective, Classifier) and distillation.reads_places:
        objective.outputs = None
