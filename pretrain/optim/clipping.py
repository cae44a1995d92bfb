"""The norm of the whole gradient, over all ranks, and scaling by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from headway.pretrain.optim.norms import square_sum
from headway.pretrain.optim.sharded import axes, local, reduced, summed


@torch.no_grad()
def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of the gradients of all parameters, over the whole mesh; equal on all ranks.

    Squares are summed in fp32 (fp64 gradients in fp64), tensors and ranks in fp64, always in the same order.
    Gradients that are spread contribute each element once, over whatever meshes they are spread; this costs
    one all-reduce of one number for each distinct mesh and way of spreading.

    Returns: a scalar on the gradients' device, fp32, or fp64 if a gradient is; 0 without gradients.
    """
    gradients = reduced(p.grad for p in parameters if p.grad is not None)
    if not gradients:
        return torch.zeros(())
    spread: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        spread[axes(gradient)].append(local(gradient))
    device = local(gradients[0]).device
    sums = summed([square_sum(parts) for parts in spread.values()], list(spread))
    total = torch.stack([s.to(device) for s in sums]).sum()
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    return total.sqrt().to(dtype)


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Factor of at most 1 that brings a gradient of this norm down to the limit.

    The small constant is that of `torch.nn.utils.clip_grad_norm_`. No synchronisation with the device.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0)


@torch.no_grad()
def scale_gradients_(parameters: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiply all gradients by a factor, in place."""
    by_device: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            part = local(p.grad)
            by_device[part.device, part.dtype].append(part)
    for (device, dtype), parts in by_device.items():
        torch._foreach_mul_(parts, factor.to(device, dtype) if isinstance(factor, Tensor) else factor)
