"""The whole objective on every rank, put together from an engine's state: for samples, maps and pictures."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.checkpoint.boxes import Box
from headway.parallel.checkpoint.layout import held
from headway.parallel.mesh import World
from headway.parallel.pipeline.plan import tensors_of
from headway.parallel.pipeline.whole import MOST
from headway.pretrain.objectives import Objective


@torch.no_grad()
def gather(blank: Objective, tensors: Mapping[str, Any], world: World) -> Objective | None:
    """An objective with whole weights, to be called without noise; None if they take more than MOST bytes. Collective.

    Args:
        blank: the objective before it was spread, on the meta device.
        tensors: state of this rank by canonical name; what it lacks others have.
    """
    wanted = tensors_of(blank)
    if sum(t.numel() * t.element_size() for t in wanted.values()) > MOST:
        return None
    whole: Objective = copy.deepcopy(blank).to_empty(device=world.device)
    whole.eval()
    for name, target in tensors_of(whole).items():
        values = target.detach()
        values.fill_(_least(values))
        for part in held({name: tensors[name]}) if name in tensors else []:
            values[part.box.within(Box.whole(values.shape))] = part.view.to(values.dtype)
        if (
            world.size > 1
        ):  # of what several ranks hold, all have the same; nothing is below what the others put there
            dist.all_reduce(values, dist.ReduceOp.MAX, group=world.everyone)
    return whole


def _least(values: Tensor) -> float:
    return float("-inf") if values.is_floating_point() else torch.iinfo(values.dtype).min
