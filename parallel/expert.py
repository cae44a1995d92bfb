"""Expert parallelism: the experts of a layer are spread over ranks, and tokens travel to them (GShard; Switch).

The axis `expert` lies inside shard x context x tensor: its groups are runs of neighbouring ranks of one replica. Where
that product is larger than `expert`, or with replicas, several groups have the same experts: data parallelism shards
these copies along the ranks that hold them, and sums their gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp._fully_shard import _fsdp_common as fsdp
from torch.distributed.tensor import DTensor, Shard

from headway.parallel.dispatch import ExpertDispatcher
from headway.parallel.mesh import Layout, World
from headway.parallel.parts import Part, mark
from headway.pretrain.config import Job
from headway.pretrain.config.rules import nearest_divisor
from headway.pretrain.errors import JobError
from headway.pretrain.models.moe import Dispatcher, MoE
from headway.pretrain.optim.sharded import local

ROUTED = ("up", "down", "gate", "up_bias", "down_bias", "gate_bias")
"""Parameters of `MoE` that belong to routed experts: [X, ...]."""


def check(job: Job, layout: Layout) -> None:
    """Raise JobError unless the model's experts can be spread that way."""
    size, experts = layout.expert, job.model.experts.count
    if size == 1:
        return
    asked, legal = job.parallel.expert, math.gcd(layout.fold, experts)
    if not experts:
        raise JobError(
            "parallel.expert", asked, "model.experts.count is 0: there are no experts to spread", 1
        )
    for number, what in ((layout.fold, "shard x context x tensor"), (experts, "model.experts.count")):
        if number % size:
            rule = f"{'' if asked == size else f'{size} ranks here; '}must divide {what} = {number}"
            raise JobError("parallel.expert", asked, rule, nearest_divisor(legal, size))
    if has_copies(layout) and not hasattr(fsdp, "ShardPlacementResult"):
        whole = layout.fold if layout.replicate == 1 and experts % layout.fold == 0 else 1
        rule = (
            f"torch {torch.__version__} cannot shard what several ranks hold of some experts; torch 2.13 can"
        )
        raise JobError("parallel.expert", asked, rule, whole)


def spread(root: nn.Module, world: World, *, plain: bool = False) -> None:
    """Give every MoE layer below `root` this rank's experts (DTensors over the expert axis, under the same names; plain
    tensors that are marked as parts if `plain`) and a dispatcher that sends tokens to theirs. Parameters are on the
    meta device."""
    if world.layout.expert == 1:
        return
    cut = _cut_plain if plain else _cut
    for moe in layers_of(root):
        for name in ROUTED:
            if (parameter := getattr(moe, name)) is not None:
                setattr(moe, name, cut(parameter, world))
        assert isinstance(moe.dispatcher, Dispatcher)
        moe.dispatcher = ExpertDispatcher(moe.dispatcher, world)


def layers_of(root: nn.Module) -> list[MoE]:
    """MoE layers in order."""
    return [module for module in root.modules() if isinstance(module, MoE)]


def routed(root: nn.Module) -> set[nn.Parameter]:
    """Parameters of routed experts."""
    return {p for moe in layers_of(root) for name in ROUTED if (p := getattr(moe, name)) is not None}


def _cut(parameter: Tensor, world: World) -> nn.Parameter:
    assert world.experts is not None
    mine = DTensor.from_local(_share(parameter, world), world.experts["expert"], [Shard(0)], run_check=False)
    return nn.Parameter(mine)


def _cut_plain(parameter: Tensor, world: World) -> nn.Parameter:
    assert world.experts is not None
    mine = _share(parameter, world)
    first = world.experts.get_local_rank("expert") * len(mine)
    return mark(nn.Parameter(mine), Part(tuple(parameter.shape), (first, *(0 for _ in mine.shape[1:]))))


def _share(parameter: Tensor, world: World) -> Tensor:
    return parameter.new_empty((parameter.shape[0] // world.layout.expert, *parameter.shape[1:]))


def has_copies(layout: Layout) -> bool:
    """Whether several ranks have the same experts, so that gradients must be summed."""
    return layout.expert > 1 and layout.replicate * layout.fold > layout.expert


def data_parallel(root: nn.Module, world: World) -> dict[str, Any]:
    """Arguments of `fully_shard` that treat routed experts as what they are: sharded over the ranks that have the same
    ones and not over all, or left alone where each rank is the only one."""
    if world.layout.expert == 1:
        return {}
    experts = routed(root)
    if not has_copies(world.layout):
        return {"ignored_params": experts}
    return {"shard_placement_fn": _placement(experts, world)}


def _placement(
    experts_here: set[nn.Parameter], world: World
) -> Callable[[nn.Parameter], fsdp.ShardPlacementFnResult]:
    assert world.experts is not None
    if world.layout.replicate > 1:
        mesh = world.experts["replicate", "copies"]
        info: fsdp.FSDPMeshInfo = fsdp.HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)
    else:
        info = fsdp.FSDPMeshInfo(world.experts["copies"], shard_mesh_dim=0)
    copies = info.shard_mesh_size

    def placement(parameter: nn.Parameter) -> fsdp.ShardPlacementFnResult:
        if parameter not in experts_here:
            return None
        # By experts where they come out even, else by rows of each, else some ranks have fewer experts.
        experts, rows = local(parameter).shape[:2]
        return fsdp.ShardPlacementResult(Shard(int(experts % copies > 0 and rows % copies == 0)), info)

    return placement
