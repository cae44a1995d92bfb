"""Recomputation and offload of a whole model."""

from __future__ import annotations

from typing import Any, cast

from headway.kernels.attention.choose import choose as choose_kernel
from headway.parallel.mesh import World, rows_per_micro_batch
from headway.parallel.planner.activations import Kernel, Policy
from headway.parallel.planner.memory import by_block, policies
from headway.parallel.planner.places import Run
from headway.parallel.recompute.budget import GIB, choose
from headway.parallel.recompute.offload import Host, offload
from headway.parallel.recompute.policies import recompute_block
from headway.pretrain.config import Job
from headway.pretrain.data.dataset import row_lengths
from headway.pretrain.models.inputs import Inputs
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
    run = describe(objective, job, world, precision, compiled)
    if job.parallel.recompute != "budget":
        return by_block(run, policies(run))
    assert job.parallel.recompute_budget is not None
    return by_block(run, choose(run, job.parallel.recompute_budget * GIB))


def describe(objective: Objective, job: Job, world: World, precision: str, compiled: bool) -> Run:
    """What memory depends on, of a model that was built."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
    m, layout = job.model, world.layout
    kernel = choose_kernel(
        m.attention.mechanism,
        m.attention.kernel,
        dropout=m.attention.dropout > 0,
        bias=m.positions == "relative",
        device=world.device.type,
        dtype=dtypes.get(precision, torch.float32),
        compiled=compiled,
        keys=job.row_tokens,
    )
    head: Any = getattr(objective, "head_weight", None)
    target = row_lengths(job)[1] if m.family == "t5" else 0
    inputs = Inputs(
        vocab=0 if head is None else head.shape[0],
        length=job.row_tokens // layout.context,
        target_length=target // layout.context,
        image=job.data.images.size if m.family == "vit" else 0,
        channels=job.data.images.channels,
    )
    return Run(
        job.model_copy(update={"precision": precision}),
        inputs,
        rows_per_micro_batch(job, layout.data),
        cast(Kernel, kernel.name),
        shard=layout.shard,
        replicate=layout.replicate,
        device=world.device.type,
    )
