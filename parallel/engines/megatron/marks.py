"""What Megatron-Core is told of parameters, by attributes of theirs; and which of them are narrow.

- `tensor_model_parallel`: a part, which counts in the norm of the gradient on every rank; of others the first rank of
  the tensor axis answers.
- `sequence_parallel`: whole, with a share of its gradient on every rank of the tensor axis (Megatron's own models have
  them under sequence parallelism only). What is not marked is not summed, and nobody says so.
- `allreduce`: false of spread experts, whose gradients are summed over the ranks that have the same ones.
- `shared`: other stages of the pipeline hold it too, and an earlier one answers for it in the norm.
- `shared_embedding`: the same, of all its holders; it gets buckets of its own, so that they shard it alike.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headway.parallel.parts import is_part

NARROW = re.compile(
    r".*\b((attention|cross)\.([qkvo]|gates\.\w+)\.(weight|bias)|mlp\.(shared\.)?(gate|up|down)\.(weight|bias)"
    r"|mlp\.(gate|up|down)(_bias)?)"
)
"""Parameters that only products read, in the dtype of products: the plan's linears and experts. Norms, tables, routers
and what a mechanism has of its own are fp32, as under autocast."""


def mark(
    named: Mapping[str, nn.Parameter],
    spread_experts: set[nn.Parameter],
    holders: Mapping[str, Sequence[int]] | None = None,
    place: int = 0,
) -> None:
    """Mark the parameters of this rank.

    Args:
        spread_experts: those of experts that are spread over ranks.
        holders: name -> stages that hold it, in a pipeline; `place` is this rank's.
    """
    for name, parameter in named.items():
        marked: Any = parameter
        marked.tensor_model_parallel = is_part(parameter)
        marked.sequence_parallel = getattr(parameter, "tensor_share", False)
        marked.allreduce = parameter not in spread_experts
        if holders and len(holders[name]) > 1:
            marked.shared_embedding = True
            marked.shared = holders[name][0] != place


def narrow(named: Mapping[str, nn.Parameter], dtype: torch.dtype | None, spectral: bool) -> dict[str, Tensor]:
    """Give parameters of products their dtype.

    Args:
        dtype: None leaves all as they are.
        spectral: reparametrised weights are divided by their norm first, in fp32.

    Returns: the values that they had, by name.
    """
    exact: dict[str, Tensor] = {}
    if dtype is None or spectral:
        return exact
    for name, parameter in named.items():
        if NARROW.fullmatch(name):
            exact[name] = parameter.data
            parameter.data = parameter.data.to(dtype)
    return exact
