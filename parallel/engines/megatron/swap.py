"""The plan's linears and tables, once they are cut, become Megatron-Core's; regions are entered its way.

After `headway.parallel.apply.spread(plain=True)` and before memory is given: names and parameters stay as they are.
What Megatron has no layer for stays ours: reparametrised linears, keys and values that several ranks share.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from headway.parallel.engines.megatron import regions
from headway.parallel.engines.megatron.layers import Table, linear_classes
from headway.parallel.engines.megatron.vocabulary import row_loss_by_megatron
from headway.parallel.parts import is_part, part_of
from headway.parallel.tensor import modules as roles
from headway.pretrain.models.spectral import SpectralLinear
from headway.pretrain.objectives.base import ChunkedLoss


class Region(roles.Local):
    """A module that enters and leaves what is computed by shares through Megatron's mappings."""

    team: dist.ProcessGroup

    def into(self, x: Tensor) -> Tensor:
        if self.columns is None:
            return regions.enter(x, self.team)
        return regions.enter_columns(x, self.columns, self.team)

    def out(self, x: Tensor) -> Tensor:
        if self.columns is None:
            return regions.leave(x, self.team)
        return regions.leave_columns(x, self.columns, self.team)


def swap(objective: Any, config: TransformerConfig, team: dist.ProcessGroup, device: str) -> None:
    """Put Megatron's layers in the places of those of an objective that were cut over the tensor axis.

    Args:
        config: of the layers.
        team: Megatron's tensor group.
        device: kind of device.
    """
    for parent in list(objective.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, roles.Local):
                setattr(parent, name, swapped(child, config, team, device))
    loss = getattr(objective, "loss", None)
    if isinstance(loss, ChunkedLoss):
        vocabulary = part_of(objective.model.embed.tokens.weight).shape[0]
        loss.compute = row_loss_by_megatron(-(-vocabulary // team.size()), loss.compute)


def swapped(module: Any, config: TransformerConfig, team: dist.ProcessGroup, device: str) -> Any:
    """What takes a module's place: a layer of Megatron's, or the module itself."""
    roles.become(module, Region, team=team)
    if isinstance(module, roles.Words):
        table: Any = module
        return Table(table, table.first, config, team)
    if not isinstance(module, nn.Linear) or isinstance(module, SpectralLinear):
        return module
    if isinstance(module, roles.Rows):
        return linear_classes(device).row(module, config, team, module.out)
    if is_part(module.weight):
        return linear_classes(device).column(module, config, team)
    return module
