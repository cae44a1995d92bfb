"""Optimizers of a model, from its named parameters and the job's settings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from headway.pretrain import config
from headway.pretrain.optim.groups import decays, is_hidden_matrix
from headway.pretrain.optim.muon import Muon
from headway.pretrain.optim.sharded import is_spread

Named = list[tuple[str, Tensor]]

FUSED = ("cpu", "cuda", "xpu")
"""Devices that have PyTorch's fused AdamW."""


def build_optimizers(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: config.Optimizer,
    muon_dtype: torch.dtype | None = None,
) -> list[Optimizer]:
    """One optimizer for each way of moving parameters: AdamW, and Muon before it where the job asks for it.

    Every group holds `base_lr`, which `set_rate` multiplies by the schedule's factor, and `param_names`.
    Muon's matrices decay at their own rate, by `muon_lr` x `weight_decay` a step.

    Args:
        named_parameters: canonical name -> parameter; those that take no gradient are left out.
        settings: the job's `optimizer` section.
        muon_dtype: of Muon's Newton-Schulz iteration; None takes the fast one (see `muon.fast_dtype`).
    """
    trained: Named = [(name, p) for name, p in named_parameters if p.requires_grad]
    matrices = [(n, p) for n, p in trained if settings.name == "muon" and is_hidden_matrix(n, p)]
    moved = {name for name, _ in matrices}
    others = [(name, p) for name, p in trained if name not in moved]
    optimizers: list[Optimizer] = []
    if matrices:
        groups = [_group(matrices, settings.muon_lr, settings.weight_decay)]
        optimizers.append(Muon(groups, settings.muon_lr, settings.momentum, dtype=muon_dtype))
    if others:
        groups = _adamw_groups(others, settings)
        fused = all(p.device.type in FUSED for _, p in others)
        optimizers.append(AdamW(groups, settings.lr, settings.betas, settings.eps, fused=fused))
    return optimizers


def set_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's learning rate to the schedule's factor times its `base_lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def _adamw_groups(named: Named, settings: config.Optimizer) -> list[dict[str, Any]]:
    """Groups by decay, and by mesh: one fused call cannot take parameters of several meshes."""
    groups: dict[tuple[bool, Any], Named] = {}
    for name, p in named:
        key = (decays(p), p.device_mesh if is_spread(p) else None)
        groups.setdefault(key, []).append((name, p))
    return [
        _group(members, settings.lr, settings.weight_decay if decay else 0.0)
        for (decay, _), members in groups.items()
    ]


def _group(named: Named, lr: float, weight_decay: float) -> dict[str, Any]:
    return {"params": named, "lr": lr, "base_lr": lr, "weight_decay": weight_decay}
