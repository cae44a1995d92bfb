"""Parameters that several ranks of a pipeline hold: a tied table, blocks that are used again, relative biases.

Every holder keeps a whole copy (or its shard of one). Gradients of the copies are added before anything looks at them,
so that all take the same step; the first holder answers for the parameter where it counts once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.mesh import World
from headway.pretrain.optim.sharded import local, reduced


class Shared:
    """Copies of parameters along the pipeline.

    Args:
        holders: name -> ranks of the pipeline that hold the parameter, in order.
        world: this process among the ranks.
    """

    def __init__(self, holders: Mapping[str, list[int]], world: World) -> None:
        self.holders, self.place, self.line = holders, world.place("pipeline"), world.group("pipeline")

    def owned(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """The parameters that this rank answers for."""
        return [p for name, p in named.items() if self.holders[name][0] == self.place]

    @torch.no_grad()
    def add_gradients(self, named: Mapping[str, Tensor]) -> None:
        """Give all copies of a parameter the sum of their gradients."""
        copied = {name: named[name] for name in self.copied(named)}
        given = [torch.zeros_like(p) if p.grad is None else p.grad for p in copied.values()]
        gradients = dict(zip(copied, reduced(given), strict=True))
        for name, gradient in gradients.items():
            copied[name].grad = gradient
        self.add({name: local(gradient) for name, gradient in gradients.items()})

    def copied(self, named: Mapping[str, Tensor]) -> list[str]:
        """Names of the parameters with a gradient that other ranks hold too."""
        return [name for name, p in named.items() if len(self.holders[name]) > 1 and p.requires_grad]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Put into the holders' tensors, one for each copy of a parameter, their sum."""
        for name in sorted(tensors):  # the same order on all ranks, or they would wait for each other
            self._add(tensors[name], self.holders[name])

    def _add(self, mine: Tensor, places: Sequence[int]) -> None:
        """Add up what all holders have, in the order of their places: the same bits everywhere.

        They exchange their parts directly: they are few, and a process group of theirs would have to be made on all
        ranks.
        """
        if not mine.numel():
            return  # of a parameter with fewer rows than shards
        parts = {
            place: mine.contiguous()
            if place == self.place
            else torch.empty_like(mine, memory_format=torch.contiguous_format)
            for place in places
        }
        messages = []
        for place in places:
            if place != self.place:
                rank = dist.get_global_rank(self.line, place)
                messages.append(dist.P2POp(dist.isend, parts[self.place], rank, self.line))
                messages.append(dist.P2POp(dist.irecv, parts[place], rank, self.line))
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        total = parts[places[0]].clone()
        for place in places[1:]:
            total += parts[place]
        mine.copy_(total)
