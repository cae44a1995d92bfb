"""Recomputation and offload of a whole model."""

from __future__ import annotations

from headway.parallel.mesh import World
from headway.parallel.recompute.policies import recompute_block
from headway.pretrain.config import Job
from headway.pretrain.models.transformer import Block
from headway.pretrain.objectives import Objective


def recompute(objective: Objective, job: Job, world: World) -> None:
    """Let the backward of the blocks compute again, or fetch from the host, what the job's settings say."""
    settings = job.parallel
    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    if settings.recompute == "none":
        policies = ["none"] * len(blocks)
    elif settings.recompute == "full":
        every = settings.recompute_every
        policies = ["full" if (i + 1) % every == 0 else "none" for i in range(len(blocks))]
    else:
        policies = [settings.recompute] * len(blocks)
    for block, policy in zip(blocks, policies, strict=True):
        recompute_block(block, policy)
