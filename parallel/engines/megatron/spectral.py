"""Power iterations of reparametrised weights that are cut over the tensor axis, as plain tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.parallel.parts import is_part, part_of
from headway.pretrain.models.spectral import SpectralLinear


def iterate(root: nn.Module, team: dist.ProcessGroup, times: int) -> None:
    """`Objective.iterate` where ranks of a group have parts of weights; collective."""
    for module in root.modules():
        if isinstance(module, SpectralLinear):
            module.iterate(whole(dict(module.named_parameters())["weight"], team), times)


@torch.no_grad()
def whole(part: Tensor, team: dist.ProcessGroup) -> Tensor:
    """A parameter that is cut along one dim or none, put together: its parts are alike in size, but for the last
    ones."""
    if not is_part(part):
        return part
    shape = part_of(part).shape
    dim = next(d for d, (ours, all_) in enumerate(zip(part.shape, shape, strict=True)) if ours != all_)
    step = -(-shape[dim] // team.size())
    rows = part.movedim(dim, 0)
    mine = rows.new_zeros(step, *rows.shape[1:])
    mine[: len(rows)] = rows
    joined = mine.new_empty(step * team.size(), *rows.shape[1:])
    dist.all_gather_into_tensor(joined, mine, group=team)
    return joined[: shape[dim]].movedim(0, dim)
