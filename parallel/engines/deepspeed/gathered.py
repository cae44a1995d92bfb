"""Weights that ZeRO-3 has cut, whole while something reads them outside a forward of the whole objective."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import nn

from headway.parallel.apply import blocks_of
from headway.pretrain.models.spectral import SpectralLinear
from headway.pretrain.objectives import Objective

METHODS = ("logits", "attention_maps", "reconstruct")
"""What people ask of a model. Blocks gather their own weights when they are called; the rest is gathered here."""


def gather_in(objective: Objective, package: Any) -> None:
    """Let methods of an objective that ZeRO-3 has cut find the weights that they read."""
    inside = {id(p) for block in blocks_of(objective) for p in block.parameters()}
    outer = [p for p in objective.parameters() if id(p) not in inside]
    for name in METHODS:
        if hasattr(objective, name):
            setattr(objective, name, _within(getattr(objective, name), outer, package))
    spectral = [p for m in objective.modules() if isinstance(m, SpectralLinear) for p in m.parameters()]
    if spectral:
        objective.iterate = _within(objective.iterate, spectral, package)  # type: ignore[method-assign]


def _within(method: Callable[..., Any], parameters: list[nn.Parameter], package: Any) -> Callable[..., Any]:
    """The method with some parameters whole while it runs."""

    @wraps(method)
    def gathered(*args: Any, **kwargs: Any) -> Any:
        with package.zero.GatheredParameters(parameters):
            return method(*args, **kwargs)

    return gathered
