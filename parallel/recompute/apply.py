"""Recomputation and offload of a whole model."""

from __future__ import annotations

from headway.parallel.mesh import World
from headway.parallel.pipeline.costs import inputs_of
from headway.parallel.planner.activations import Policy
from headway.parallel.planner.describe import describe
from headway.parallel.planner.memory import by_block, policies
from headway.parallel.recompute.budget import GIB, choose
from headway.parallel.recompute.offload import Host, offload
from headway.parallel.recompute.policies import recompute_block
from headway.pretrain.config import Job
from headway.pretrain.models.transformer import Block
from headway.pretrain.objectives import Objective


def recompute(objective: Objective, job: Job, world: World, precision: str, compiled: bool) -> Host | None:
    """Let the backward of the blocks compute again, or fetch from the host, what the job's settings say.

    Args:
        objective: on the meta device; its blocks are changed.
        job: `parallel.recompute` and its kin are read.
        world: layout and device.
        precision: resolved: fp32, fp64, bf16 or fp16.
        compiled: whether blocks will be compiled.

    Returns:
        Where offloaded tensors are, if they are offloaded.

    Raises:
        JobError: the budget is too small.
    """
    settings = job.parallel
    if settings.recompute == "none" and not settings.offload:
        return None
    blocks = [module for module in objective.modules() if isinstance(module, Block)]
    for block, policy in zip(blocks, _policies(objective, job, world, precision, compiled), strict=True):
        recompute_block(block, policy)
    if not settings.offload:
        return None
    host = Host(world.device)
    for block in blocks:
        offload(block, host)
    return host


def _policies(objective: Objective, job: Job, world: World, precision: str, compiled: bool) -> list[Policy]:
    """A policy for every block that this rank holds."""
    inputs, layout = inputs_of(objective, job), world.layout
    kind = world.device.type
    every = [
        describe(job, inputs, layout, place, precision=precision, device=kind, compiled=compiled)
        for place in range(layout.pipeline)
    ]
    run, budget = every[world.place("pipeline")], job.parallel.recompute_budget
    if job.parallel.recompute != "budget":
        return by_block(run, policies(run))
    assert budget is not None
    chosen = [choose(stage, budget * GIB) for stage in every]  # of all stages: all ranks refuse it, or none
    return by_block(run, chosen[run.place])
