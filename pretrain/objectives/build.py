"""From a job to an objective that holds its model."""

from __future__ import annotations

import torch

from headway.pretrain.config import Job
from headway.pretrain.models.gpt import GPT
from headway.pretrain.models.init import initialise
from headway.pretrain.objectives.causal import CausalLM


def build_objective(
    job: Job, vocab: int, seq_len: int | None = None, device: torch.device | str = "cpu"
) -> CausalLM:
    """The job's objective with initial weights, fp32 (fp64 for precision fp64).

    Args:
        job: the run.
        vocab: rows of token table and head.
        seq_len: rows of a learned position table; `data.seq_len` if not given.
        device: where it is built. On "meta" nothing is filled: materialise with `to_empty`, then call
            `headway.pretrain.models.init.initialise(objective, job.model, job.train.seed)`.

    Raises:
        JobError: the attention kernel that was asked for cannot do what the job asks.
    """
    model = job.model
    with torch.device(device):
        gpt = GPT(model, vocab, seq_len or job.data.seq_len)
        objective = CausalLM(gpt, vocab, model.tied, job.objective, job.data.documents == "isolate")
    if job.precision == "fp64":
        objective.double()
    if torch.device(device).type != "meta":
        initialise(objective, model, job.train.seed)
    return objective
