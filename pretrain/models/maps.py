"""Attention maps of a model, for people and for comparisons: its weights are asked of the mechanisms' references.

Shapes: B batch, S sequence, H query heads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from headway.pretrain.models.attention import Core


@torch.no_grad()
def attention_maps(model: nn.Module, *inputs: Any, **named: Any) -> Tensor:
    """Weights of self-attention's layers and heads of the model's first tower, by the mechanism's reference.

    Args:
        model: called with the other arguments.

    Returns:
        [layers, B, H, S, S] in order of computation, of the layers that have weights; of no layers [0, ...].
    """
    maps: list[Tensor] = []

    def record(core: Any, arguments: Any) -> None:
        q_BHSD, k_BKMD, _, mask, _, bias, own = arguments
        maps.append(core.weights(q_BHSD, k_BKMD, mask, bias, own))

    cores = [core for _, core in _with_weights(model)]
    if not cores:
        return torch.empty(0, 1, 0, 0, 0)
    hooks = [core.register_forward_pre_hook(record) for core in cores]
    try:
        with torch.compiler.set_stance("force_eager"):
            model(*inputs, **named)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)


def mapped_layers(model: nn.Module) -> list[int]:
    """Numbers of the layers (uses of blocks, from 0) whose maps `attention_maps` gives, in its order."""
    stack: Any = _first_stack(model)
    return [
        number * stack.repeats + time for number, _ in _with_weights(model) for time in range(stack.repeats)
    ]


def _first_stack(model: nn.Module) -> Any:
    return next(m for name, m in model.named_modules() if name.rpartition(".")[2] == "blocks")


def _with_weights(model: nn.Module) -> list[tuple[int, Core]]:
    """Numbers and cores of the first tower's blocks that have attention weights."""
    cores = ((i, getattr(block.attention, "core", None)) for i, block in enumerate(_first_stack(model)))
    return [(i, core) for i, core in cores if core is not None and core.has_weights]
