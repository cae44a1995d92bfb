"""Megatron-Core's optimizers around ours, with our parameter groups: decay, rates by depth, base rates.

Megatron's own groups exempt whatever has one dim from weight decay; ours are told by `pretrain.optim.groups`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn
from torch.optim import Optimizer

from headway.pretrain import config
from headway.pretrain.optim.adamw import AdamW
from headway.pretrain.optim.build import allocate_state, build_one


def build(
    named: Mapping[str, nn.Parameter],
    names: Iterable[str],
    settings: config.Optimizer,
    how: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    groups: ProcessGroupCollection,
    muon: torch.dtype | None = None,
) -> ChainedOptimizer:
    """One optimizer for what all data ranks have alike, and one for spread experts; every rank has both or neither.

    Args:
        named: trained parameters of this rank.
        names: of the whole model's parameters, by which depth is told.
        settings: of the job.
        how: Megatron's settings.
        chunks: the model's stages on this rank, in buffers.
        groups: Megatron's.
        muon: dtype of Muon's iteration.
    """
    known = list(names)
    alike = {name: p for name, p in named.items() if p.allreduce}  # type: ignore[attr-defined]
    routed = {name: p for name, p in named.items() if name not in alike}
    buffers = {i: chunk.buffers for i, chunk in enumerate(chunks)}
    optimizers = [
        _around(
            _inner(alike, known, settings, muon), how, chunks, buffers, groups.intra_dp_cp, groups.mp, groups
        )
    ]
    if groups.ep.size() > 1:
        buffers = {i: chunk.expert_parallel_buffers for i, chunk in enumerate(chunks)}
        inner = _inner(routed, known, settings, muon)
        optimizers.append(_around(inner, how, chunks, buffers, groups.intra_expt_dp, groups.tp_ep_pp, groups))
    return ChainedOptimizer(optimizers)


def _inner(
    named: Mapping[str, nn.Parameter], names: list[str], settings: config.Optimizer, muon: torch.dtype | None
) -> Optimizer:
    """Our optimizer over parameters, which may be none."""
    if not named:
        return AdamW([{"params": [], "base_lr": settings.lr}], settings.lr, settings.betas, settings.eps)
    optimizer = build_one(named.items(), settings, muon, names)
    for group in optimizer.param_groups:  # Megatron puts shards in their place, of other numbers
        group.pop("param_names", None)
    return optimizer


def _around(
    inner: Optimizer,
    how: OptimizerConfig,
    chunks: list[DistributedDataParallel],
    buffers: dict[int, Any],
    data: Any,
    copies: Any,
    groups: ProcessGroupCollection,
) -> Any:
    """Megatron's optimizer around an inner one.

    Args:
        data: ranks that have the same parameters.
        copies: ranks over which the norm is summed where optimizer state is not sharded.
    """
    if how.use_distributed_optimizer:
        outer: Any = DistributedOptimizer(
            inner, how, None, None, chunks, buffers, data, None, groups.mp.rank(), 0
        )
        outer.grad_stats_parallel_group = groups.intra_dist_opt
    else:
        kind = Float16OptimizerWithFloat16Params if how.bf16 else FP32Optimizer
        outer = kind(inner, how, *([None] if how.bf16 else []), None)
        outer.grad_stats_parallel_group = copies
    outer.tp_group = groups.tp
    if isinstance(inner, AdamW):
        allocate(inner)
    else:
        allocate_state(inner)
    return outer


@torch.no_grad()
def allocate(optimizer: AdamW) -> None:
    """Create the moments now, all zero, and for every parameter a step of its own, so that a checkpoint can be read
    into them."""
    fused = optimizer.defaults.get("fused")
    for parameter in chain.from_iterable(group["params"] for group in optimizer.param_groups):
        device = parameter.device if fused else torch.device("cpu")
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }


def gradients(optimizer: ChainedOptimizer) -> list[Tensor]:
    """What is left to Megatron's optimizers of the gradients on this rank, fp32."""
    return [
        p.grad for each in optimizer.chained_optimizers for p in each.get_parameters() if p.grad is not None
    ]
