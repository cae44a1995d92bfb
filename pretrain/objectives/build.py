"""From a job to an objective that holds its model."""

from __future__ import annotations

import numpy as np
import torch

from headway.pretrain.config import Job
from headway.pretrain.data.specials import Specials
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives.base import Objective
from headway.pretrain.objectives.causal import CausalLM
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.distill.attach import TeacherShape, learn_from
from headway.pretrain.objectives.mae import MaskedAutoencoder
from headway.pretrain.objectives.masked import MaskedLM
from headway.pretrain.objectives.seq2seq import Seq2SeqLM


def build_objective(
    job: Job,
    inputs: Inputs,
    specials: Specials | None = None,
    starts: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    teacher: TeacherShape | None = None,
) -> Objective:
    """The job's objective with initial weights, fp32 (fp64 for precision fp64).

    Args:
        job: the run.
        inputs: what the data says of vocabulary, lengths, images and classes.
        specials: ids of special tokens; needed to collate, not to compute.
        starts: bool [V], pieces that begin a word; needed for whole-word masking.
        device: where it is built. On "meta" nothing is filled: materialise with `to_empty`, then call
            `headway.pretrain.models.init.initialise(objective, job.model, job.train.seed)`.
        teacher: what it learns from (`objective.distill`).

    Raises:
        JobError: the attention kernel that was asked for cannot do what the job asks.
    """
    with torch.device(device):
        objective = _build(job, inputs, specials, starts)
        if teacher is not None:
            learn_from(objective, job, inputs, teacher)
    if job.precision == "fp64":
        objective.double()
    if torch.device(device).type != "meta":
        initialise(objective, job.model, job.train.seed)
    return objective


def _build(job: Job, inputs: Inputs, specials: Specials | None, starts: np.ndarray | None) -> Objective:
    name = job.objective.name
    if name == "masked":
        return MaskedLM(job, inputs, specials, starts)
    if name == "classify":
        return Classifier(job, inputs)
    if name == "mae":
        return MaskedAutoencoder(job, inputs)
    if job.model.family == "t5":
        return Seq2SeqLM(job, inputs, specials)
    return CausalLM(job, inputs, specials)
