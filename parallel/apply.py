"""How a model is spread: every technique, once, in the order in which it is applied."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from headway.parallel import expert
from headway.parallel.checkpoint.layout import held
from headway.parallel.float8 import to_float8
from headway.parallel.mesh import World
from headway.parallel.parts import MARKS, part_of
from headway.parallel.pipeline.plan import Plan
from headway.parallel.recompute.apply import recompute
from headway.parallel.recompute.policies import compile_block
from headway.parallel.tensor.split import split
from headway.pretrain.config import Job
from headway.pretrain.models.init import Slice, initialise
from headway.pretrain.models.transformer import Block
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.base import ChunkedLoss


def apply(
    objective: Objective,
    job: Job,
    world: World,
    *,
    precision: str,
    compiled: bool,
    plan: Plan | None = None,
) -> nn.Module:
    """Spread an objective that was built on the meta device, give it memory and its initial weights.

    Returns the module to call: the objective itself, or DDP around it. Names of parameters do not change.
    With the plan of a pipeline, this rank's part of it is kept.
    """
    layout = world.layout
    spread(objective, job, world, precision=precision, compiled=compiled, plan=plan)
    modelled = layout.pipeline * layout.context * layout.tensor > 1
    copied = (modelled and layout.replicate > 1) or expert.has_copies(layout)
    if layout.shard * layout.context > 1 or copied:
        # In a pipeline many micro-batches are under way at once: parameters stay gathered for the step.
        shard(objective, world, reshard=job.parallel.reshard and plan is None)
    materialise(objective, job, world)
    if layout.replicate > 1 and layout.shard == 1 and not modelled:
        return replicate(objective, world)
    return objective


def spread(
    objective: Objective,
    job: Job,
    world: World,
    *,
    precision: str,
    compiled: bool = False,
    plan: Plan | None = None,
    plain: bool = False,
) -> None:
    """All techniques but data parallelism, on the meta device: what every engine does alike.

    Args:
        plain: parts of parameters are plain tensors (`parallel.parts`), not DTensors.
    """
    layout = world.layout
    if plan:
        plan.prune(objective, world.place("pipeline"))
    if precision == "fp8":
        to_float8(objective, emulate=world.device.type == "cpu")
    if layout.tensor > 1:
        split(objective, job, world, plain=plain)
    if layout.context > 1:
        from headway.parallel.context.apply import spread as spread_context

        spread_context(objective, job, world)
    expert.spread(objective, world, plain=plain)
    recompute(objective, job, world, precision, compiled)
    if compiled:
        compile_blocks(objective)


def materialise(objective: Objective, job: Job, world: World) -> None:
    """Give an objective memory and its initial weights."""
    marks = {
        name: {k: v for k, v in vars(p).items() if k in MARKS} for name, p in objective.named_parameters()
    }
    objective.to_empty(device=world.device)
    for name, parameter in objective.named_parameters():  # other objects than before
        vars(parameter).update(marks[name])
    initialise(objective, job.model, job.train.seed, slice_of=local_slice)


def compile_blocks(objective: Objective) -> None:
    """Compile the block, once for all blocks, and the loss: most of the gain at a fraction of the wait."""
    for block in blocks_of(objective):
        compile_block(block)
    if isinstance(loss := getattr(objective, "loss", None), ChunkedLoss):
        loss.compile()


def blocks_of(objective: Objective) -> list[Block]:
    """All blocks, of all towers, in order."""
    return [module for module in objective.modules() if isinstance(module, Block)]


def shard(objective: Objective, world: World, *, reshard: bool) -> None:
    """FSDP2 around every block and around the rest; with a replicate axis, HSDP.

    Gradients are summed, not averaged: the loss is divided by the global count of tokens already.
    """
    mesh = data_mesh(world)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float64 if _is_double(objective) else torch.float32)
    experts = expert.data_parallel(objective, world)
    for block in blocks_of(objective):
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard, **experts)
    fully_shard(objective, mesh=mesh, mp_policy=policy, reshard_after_forward=False, **experts)
    for module in objective.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    for method in ("logits", "attention_maps", "reconstruct"):  # they gather parameters as the forward does
        if hasattr(objective, method):
            register_fsdp_forward_method(objective, method)


def data_mesh(world: World) -> DeviceMesh:
    """Along which gradients are reduced: shard and context, folded into one; replicate, if there is one, outside."""
    assert world.mesh is not None
    inner = world.mesh["shard"]
    if world.layout.context > 1:
        inner = world.mesh["shard", "context"]._flatten("shard_context")
    if world.layout.replicate == 1:
        return inner
    return DeviceMesh._concatenate([world.mesh["replicate"], inner])


def replicate(objective: Objective, world: World) -> nn.Module:
    """Plain DDP. Replicas are equal by construction, so nothing is broadcast at the start."""
    return DistributedDataParallel(
        objective,
        device_ids=[world.device.index] if world.device.type == "cuda" else None,
        broadcast_buffers=False,
        gradient_as_bucket_view=True,
        init_sync=False,
        process_group=world.everyone,
    )


def local_slice(name: str, parameter: nn.Parameter) -> Slice:
    """This rank's piece of a parameter and where it begins in the whole."""
    if not isinstance(parameter, DTensor):
        return Slice(parameter, *part_of(parameter))
    local, shape = parameter.to_local(), tuple(parameter.shape)
    if not local.numel():
        return Slice(local, shape, (0,) * len(shape))
    # Not by torch's compute_local_shape_and_global_offset, which is wrong where shards of shards are not even.
    (part,) = held({name: parameter})
    return Slice(local, shape, part.box.offset)


def _is_double(module: nn.Module) -> bool:
    return next(module.parameters()).dtype == torch.float64
