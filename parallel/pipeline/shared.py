"""Parameters that several ranks of a pipeline hold: a tied table, blocks that are used again, relative biases.

Every holder keeps a whole copy (or its shard of one). Gradients of the copies are added before anything looks at them,
so that all take the same step; the first holder answers for the parameter where it counts once.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import World
from headway.pretrain.optim.sharded import local, reduced


class Shared:
    """Copies of parameters along the pipeline.

    Args:
        holders: name -> ranks of the pipeline that hold the parameter, in order.
        world: this process among the ranks; all ranks make this together.
    """

    def __init__(self, holders: Mapping[str, list[int]], world: World) -> None:
        self.place, line = world.place("pipeline"), world.group("pipeline")
        self.holders = holders
        ranks = dist.get_process_group_ranks(line)
        self.groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for places in sorted({tuple(held) for held in holders.values() if len(held) > 1}):
            if self.place in places:
                members = [ranks[place] for place in places]
                whole = len(members) == len(ranks)
                self.groups[places] = (
                    line if whole else dist.new_group(members, use_local_synchronization=True)
                )

    def owned(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """The parameters that this rank answers for."""
        return [p for name, p in named.items() if self.holders[name][0] == self.place]

    @torch.no_grad()
    def add_gradients(self, named: Mapping[str, Tensor]) -> None:
        """Give all copies of a parameter the sum of their gradients."""
        for name in sorted(named):
            parameter, group = named[name], self.groups.get(tuple(self.holders[name]))
            if group is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad = reduced(parameter.grad)
            dist.all_reduce(local(parameter.grad), group=group)
