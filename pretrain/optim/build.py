"""Optimizers of a model, from its named parameters and the job's settings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from headway.pretrain import config
from headway.pretrain.optim.adafactor import Adafactor
from headway.pretrain.optim.adamw import AdamW
from headway.pretrain.optim.groups import decays, is_hidden_matrix, rate_factors
from headway.pretrain.optim.lamb import Lamb
from headway.pretrain.optim.muon import Muon

Named = list[tuple[str, Tensor]]

FUSED = ("cpu", "cuda", "xpu")
"""Devices that have PyTorch's fused AdamW."""


def build_optimizers(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: config.Optimizer,
    muon_dtype: torch.dtype | None = None,
    names: Iterable[str] | None = None,
) -> list[Optimizer]:
    """One optimizer for each way of moving parameters: the one that is asked for; with Muon, AdamW after it.

    Every group holds `base_lr`, which `set_rate` multiplies by the schedule's factor, and `param_names`. The
    base rates are those of the settings, scaled by depth (`optimizer.layer_decay`). Muon's matrices decay at
    their own rate, by `muon_lr` x `weight_decay` a step.

    Args:
        named_parameters: canonical name -> parameter; those that take no gradient are left out.
        settings: the job's `optimizer` section.
        muon_dtype: of Muon's Newton-Schulz iteration; None takes the fast one (see `muon.fast_dtype`).
        names: of the whole model's parameters, by which depth is told; those given here if not given.
    """
    named = list(named_parameters)
    factors = rate_factors(names or [name for name, _ in named], settings.layer_decay)
    trained: Named = [(name, p) for name, p in named if p.requires_grad]
    matrices = [(n, p) for n, p in trained if settings.name == "muon" and is_hidden_matrix(n, p)]
    moved = {name for name, _ in matrices}
    others = [(name, p) for name, p in trained if name not in moved]
    optimizers: list[Optimizer] = []
    if matrices:
        groups = _groups(matrices, settings.muon_lr, settings.weight_decay, factors)
        optimizers.append(Muon(groups, settings.muon_lr, settings.momentum, dtype=muon_dtype))
    if others:
        groups = _groups(others, settings.lr, settings.weight_decay, factors)
        optimizers.append(_main(groups, settings))
    return optimizers


def build_one(
    named_parameters: Iterable[tuple[str, torch.nn.Parameter]],
    settings: config.Optimizer,
    muon_dtype: torch.dtype | None = None,
    names: Iterable[str] | None = None,
) -> Optimizer:
    """As `build_optimizers`, as one optimizer."""
    optimizers = build_optimizers(named_parameters, settings, muon_dtype, names)
    return optimizers[0] if len(optimizers) == 1 else Together(optimizers)


class Together(Optimizer):
    """Several optimizers as one, for libraries that know one alone: each moves its own groups.

    Groups and state are those of the optimizers, not copies.
    """

    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([group for each in self.optimizers for group in each.param_groups], {})
        for each in self.optimizers:
            each.state = self.state

    def step(self, closure: Any = None) -> Any:
        """One step of each."""
        loss = closure() if closure else None
        for each in self.optimizers:
            each.step()
        return loss


def allocate_state(optimizer: Optimizer) -> None:
    """Create the moments now, all zero, so that a checkpoint can be read into them.

    A step with zero gradients and zero learning rate does so in every torch optimizer and moves nothing.
    """
    groups = optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate
        for parameter in group["params"]:
            parameter.grad = None
    for value in chain.from_iterable(entries.values() for entries in optimizer.state.values()):
        if isinstance(value, Tensor):
            value.zero_()


def set_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's learning rate to the schedule's factor times its `base_lr`."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def _main(groups: list[dict[str, Any]], settings: config.Optimizer) -> Optimizer:
    if settings.name == "lamb":
        return Lamb(groups, settings.lr, settings.betas, settings.eps)
    if settings.name == "adafactor":
        return Adafactor(groups, settings.lr)
    fused = all(p.device.type in FUSED for group in groups for _, p in group["params"])
    return AdamW(groups, settings.lr, settings.betas, settings.eps, fused=fused)


def _groups(
    named: Named, lr: float, weight_decay: float, factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Groups by decay and by rate."""
    groups: dict[tuple[bool, float], Named] = {}
    for name, p in named:
        groups.setdefault((decays(name, p), factors[name]), []).append((name, p))
    return [
        {
            "params": members,
            "lr": lr * factor,
            "base_lr": lr * factor,
            "weight_decay": weight_decay if decay else 0.0,
            "adapt": decay,  # of Lamb: the others take no notice
        }
        for (decay, factor), members in groups.items()
    ]
