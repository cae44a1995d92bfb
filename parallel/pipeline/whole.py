"""The whole objective on every rank of a pipeline, for what is done with a trained model: samples, maps, pictures."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import World
from headway.parallel.pipeline.plan import Plan, tensors_of
from headway.pretrain.objectives import Objective
from headway.pretrain.optim.sharded import is_spread

MOST = 2**32
"""Bytes of weights that are brought together on every rank; reports of larger models do without."""


def gather(plan: Plan, objective: Objective, world: World) -> Objective | None:
    """The objective with the weights of all stages, to be called without noise; None if they take more than MOST bytes.

    Collective.
    """
    wanted = tensors_of(plan.whole)
    if sum(t.numel() * t.element_size() for t in wanted.values()) > MOST:
        return None
    whole: Objective = copy.deepcopy(plan.whole).to_empty(device=world.device)
    whole.eval()
    held, place = tensors_of(objective), world.place("pipeline")
    with torch.no_grad():
        for name, target in tensors_of(whole).items():
            owner = plan.holders[name][0]
            if owner == place:
                target.copy_(_full(held[name]))
            group = world.group("pipeline")
            dist.broadcast(target, dist.get_global_rank(group, owner), group=group)
    return whole


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if is_spread(tensor) else tensor
