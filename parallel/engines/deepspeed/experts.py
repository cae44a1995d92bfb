"""Expert parallelism in DeepSpeed's words: which parameters are experts', and which ranks have the same ones."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.parallel.expert import layers_of, routed
from headway.parallel.mesh import World
from headway.parallel.tensor.modules import become

NAME = "experts"
"""Of the process groups, by which DeepSpeed finds them."""


def mark(root: nn.Module, world: World) -> None:
    """Mark the routed experts below `root`, on the meta device, and make their process groups known."""


def regroup(optimizer: Optimizer, root: nn.Module, world: World) -> None:
    """Give experts' parameters groups of their own in an optimizer, as ZeRO wants them."""


def copies(parameter: Tensor) -> dist.ProcessGroup | None:
    """The ranks that have the same experts, for an expert's parameter; None for others."""
    return None
