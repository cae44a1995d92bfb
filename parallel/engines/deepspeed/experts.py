"""Expert parallelism in DeepSpeed's words: which parameters are experts', and which ranks have the same ones."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.parallel.engines.deepspeed.ranks import fold
from headway.parallel.expert import layers_of, routed
from headway.parallel.mesh import World


def mark(root: nn.Module, world: World, alone: dist.ProcessGroup) -> None:
    """Mark the routed experts below `root`, and make their process groups known to DeepSpeed.

    Args:
        alone: the group of this rank only.
    """
    if world.experts is None:
        return
    from deepspeed.utils import groups

    name, ranks = f"ep_size_{world.layout.expert}", world.experts
    copies = fold(ranks, ("replicate", "copies"), alone)
    groups._EXPERT_PARALLEL_GROUP[name] = ranks.get_group("expert")
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = copies
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(ranks.get_group("expert"))
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = dist.get_process_group_ranks(copies)
    for moe in layers_of(root):
        kind: Any = type(moe)
        moe.__class__ = _recognised(kind)
        moe.num_experts = len(moe.up) * world.layout.expert  # type: ignore[assignment]
    for parameter in routed(root):
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = name  # type: ignore[attr-defined]


def regroup(optimizer: Optimizer, world: World) -> None:
    """Give the experts' parameters groups of their own in an optimizer, which ZeRO shards over their own ranks."""
    if world.experts is None:
        return
    groups = []
    for group in optimizer.param_groups:
        apart: dict[str | None, list[Tensor]] = {}
        for parameter in group["params"]:
            apart.setdefault(getattr(parameter, "group_name", None), []).append(parameter)
        for name, members in apart.items():
            marks = {} if name is None else {"moe": True, "name": name}
            groups.append(group | {"params": members} | marks)
    optimizer.param_groups[:] = groups


def copies_of(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that have the same experts, for an expert's parameter; None for others."""
    name = getattr(parameter, "group_name", None)
    if name is None:
        return None
    from deepspeed.utils import groups

    found: dist.ProcessGroup = groups._get_expert_data_parallel_group(name)
    return found


@cache
def _recognised(kind: Any) -> Any:
    """A class of our layers of experts that DeepSpeed takes for one of its own, by whose presence it tells whether a
    model has experts."""
    from deepspeed.moe.layer import MoE

    class Recognised(MoE):
        def set_deepspeed_parallelism(self, *_: Any) -> None:
            """The groups are there."""

    return type(f"Recognised{kind.__name__}", (kind, Recognised), {})
