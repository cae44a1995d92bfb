"""Layer-sequential unit variance: a pass over the first batch that scales initial weights (Mishkin and Matas 2016).

Meant to follow `init.scheme: orthogonal`. Layers are taken in the order in which a forward reaches them; each is
scaled until the variance of its outputs, over the whole global batch, is one (algorithm 1).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from headway.pretrain.models.spectral import SpectralLinear

Reduce = Callable[[list[float]], list[float]]


@torch.no_grad()
def lsuv(
    objective: nn.Module,
    forward: Callable[[], Any],
    reduce: Reduce = list,
    tolerance: float = 1e-3,
    iterations: int = 5,
) -> dict[str, float]:
    """Scale the linear layers of blocks to outputs of unit variance; stacks of experts' matrices and routers keep
    their weights, heads and embeddings too.

    A layer takes one forward to measure and one after each correction: two a layer, as a rule.

    Args:
        objective: with initial weights. Weights are multiplied in place by a number, whole or sharded; where
            they were gathered for the forward, `forward` must free the gathered copies before it returns.
        forward: runs the objective over this rank's rows of the first global batch, without noise.
        reduce: sums numbers over the ranks that share the batch; called equally often on all of them.
        tolerance: largest |variance - 1| that is left alone.
        iterations: corrections of one layer at most: layers that share weights with earlier ones (ALBERT) move
            their own inputs, the others are right after one.

    Returns:
        Canonical name -> variance of the outputs as last measured, in order of execution.
    """
    variances: dict[str, float] = {}
    with torch.compiler.set_stance("force_eager"):
        for name, layer in _in_order(objective, forward):
            for attempt in range(iterations + 1):
                variance = _output_variance(layer, forward, reduce)
                variances[name] = variance
                if abs(variance - 1) <= tolerance or attempt == iterations or variance == 0:
                    break
                _scale(layer, variance**-0.5)
    return variances


def _scale(layer: nn.Linear, factor: float) -> None:
    """Scale a layer's product; a sigmaReparam's weight has no scale, its gain has."""
    weight = layer.gain if isinstance(layer, SpectralLinear) else layer.weight
    weight.mul_(factor)


def _in_order(objective: nn.Module, forward: Callable[[], Any]) -> list[tuple[str, nn.Linear]]:
    """Hidden linear layers by first execution."""
    hidden: dict[nn.Module, tuple[str, nn.Linear]] = {
        module: (name, module)
        for name, module in objective.named_modules()
        if isinstance(module, nn.Linear) and "blocks" in name.split(".") and not name.endswith("router")
    }
    seen: dict[nn.Module, tuple[str, nn.Linear]] = {}
    with _outputs(list(hidden), lambda module, _: seen.setdefault(module, hidden[module])):
        forward()
    return list(seen.values())


def _output_variance(layer: nn.Linear, forward: Callable[[], Any], reduce: Reduce) -> float:
    """Variance of all outputs about their common mean, over all ranks."""
    sums = [0.0, 0.0, 0.0]

    def add(_: nn.Module, output: Tensor) -> None:
        wide = output.double()
        for i, number in enumerate((wide.numel(), wide.sum().item(), wide.square().sum().item())):
            sums[i] += number

    with _outputs([layer], add):
        forward()
    count, total, squares = reduce(sums)
    return squares / count - (total / count) ** 2


@contextmanager
def _outputs(layers: Sequence[nn.Module], see: Callable[[nn.Module, Tensor], Any]) -> Any:
    """Show every output of the layers to `see`."""

    def hook(module: nn.Module, _: Any, output: Tensor) -> None:
        see(module, output)

    hooks = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()
