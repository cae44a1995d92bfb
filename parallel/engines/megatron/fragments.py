"""Main parameters and moments of Megatron-Core's optimizers as live pieces of canonical tensors.

The distributed optimizer cuts flat buffers into equal runs, one a data rank, wherever parameters begin and end: of a
parameter a rank has one run of elements, or none. `state_dict` and `load_state_dict` of Megatron's are not used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from headway.parallel.checkpoint.fragments import Fragment
from headway.parallel.parts import is_part, part_of


class Piece(NamedTuple):
    """What this rank has of a parameter's state.

    Attributes:
        main: fp32 values that the optimizer moves, flat.
        start: where they begin in the flattened parameter.
        moments: by name; of those that have a number for each of `main`'s, as `main` is cut.
        holders: ranks that have the same piece; None if none or not known.
    """

    main: Tensor
    start: int
    moments: dict[str, Tensor]
    holders: frozenset[int] | None


def pieces(
    optimizer: ChainedOptimizer, named: Mapping[str, nn.Parameter], copies: Copies
) -> dict[str, Piece]:
    """Name -> this rank's piece of a trained parameter, which may be empty."""
    names = {parameter: name for name, parameter in named.items()}
    found: dict[str, Piece] = {}
    for each in optimizer.chained_optimizers:
        sharded = isinstance(each, DistributedOptimizer)
        for parameter, main in _mains(each):
            start = each._get_model_param_range_map(parameter)["param"].start if sharded else 0
            entries = {key: value.detach() for key, value in each.state[main].items()}
            holders = None if sharded else copies.of(parameter)
            found[names[parameter]] = Piece(main.detach().view(-1), start, entries, holders)
    return {name: found.get(name) or _nothing(parameter) for name, parameter in named.items()}


class Copies(NamedTuple):
    """Ranks that hold the same of what is not sharded: parts along the tensor axis, whole parameters, experts."""

    parts: frozenset[int]
    wholes: frozenset[int]
    experts: frozenset[int]

    @classmethod
    def among(cls, groups: ProcessGroupCollection) -> Copies:
        each = groups.dp_cp, groups.tp_dp_cp, groups.expt_dp
        return cls(*(frozenset(dist.get_process_group_ranks(group)) for group in each))

    def of(self, parameter: nn.Parameter) -> frozenset[int]:
        if not parameter.allreduce:  # type: ignore[attr-defined]
            return self.experts
        return self.parts if is_part(parameter) else self.wholes


def state(found: Mapping[str, Piece], named: Mapping[str, nn.Parameter]) -> dict[str, Any]:
    """The pieces under canonical names, as native's state has them."""
    tensors: dict[str, Any] = {}
    for name, piece in found.items():
        tensors[name] = fragment(piece.main, piece, named[name])
        for key, value in piece.moments.items():
            follows = key != "step" and value.numel() == piece.main.numel()
            run = fragment(value.view(-1), piece, named[name]) if follows else value
            tensors[f"optimizer.{name}.{key}"] = run
    return tensors


def fragment(run: Tensor, piece: Piece, parameter: nn.Parameter) -> Fragment:
    """A run as long as a piece, as part of the whole that the parameter is part of."""
    part = part_of(parameter)
    return Fragment(run, part.shape, part.offset, tuple(parameter.shape), piece.start, piece.holders)


@torch.no_grad()
def refresh(optimizer: ChainedOptimizer) -> None:
    """Bring the model's parameters up to main parameters that were written; collective."""
    for each in optimizer.chained_optimizers:
        if hasattr(each, "_copy_main_params_to_model_params"):
            each._copy_main_params_to_model_params()
    for chunk in optimizer.model_chunks:
        if chunk.ddp_config.use_distributed_optimizer:
            chunk.start_param_sync(force_sync=True)


def _nothing(parameter: nn.Parameter) -> Piece:
    """Of a parameter that other data ranks have."""
    return Piece(parameter.new_empty(0, dtype=torch.float32).detach(), 0, {}, None)


def _mains(each: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Parameters of the model and what the optimizer moves in their stead, by Megatron's groups.

    Its map from parameters to places in groups is of no use where a group has narrow and fp32 ones: it counts them
    in one order and lists them in another.
    """
    pairs: tuple[tuple[Any, Any], ...]
    if isinstance(each, DistributedOptimizer):
        pairs = (
            (each.model_fp32_groups, each.shard_fp32_groups),
            (each.model_float16_groups, each.shard_fp32_from_float16_groups),
        )
    elif hasattr(each, "float16_groups"):
        pairs = (
            (each.fp32_from_fp32_groups, each.fp32_from_fp32_groups),
            (each.float16_groups, each.fp32_from_float16_groups),
        )
    else:
        groups = [group["params"] for group in each.param_groups]
        pairs = ((groups, groups),)
    for models, mains in pairs:
        for model_group, main_group in zip(models, mains, strict=True):
            yield from zip(model_group, main_group, strict=True)
