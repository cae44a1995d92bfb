"""The norm of the whole gradient, over all ranks, and scaling by it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from headway.pretrain.optim.sharded import is_spread, local, reduced

PIECE = 1024
"""Elements whose squares a CPU sums in fp32 at once. PyTorch's CPU reduction keeps so few running sums that
the fp32 norm of 5e7 elements is 0.2% too small; sums of pieces, added in fp64, are good to some 1e-7."""


def global_norm(parameters: Iterable[Tensor]) -> Tensor:
    """L2 norm of the gradients of all parameters, over the whole mesh; equal on all ranks.

    Squares are summed in fp32 (fp64 gradients in fp64), tensors and ranks in fp64, always in the same order.
    Gradients that are spread contribute each element once, over whatever meshes they are spread; this costs
    one all-reduce of one number for each distinct mesh and way of spreading.

    Returns: a scalar on the gradients' device, fp32, or fp64 if a gradient is; 0 without gradients.
    """
    gradients = [reduced(p.grad) for p in parameters if p.grad is not None]
    if not gradients:
        return torch.zeros(())
    spread: dict[Any, list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        key = None
        if is_spread(gradient):
            key = gradient.device_mesh, tuple(not p.is_replicate() for p in gradient.placements)
        spread[key].append(local(gradient))
    device = local(gradients[0]).device
    total = torch.stack(
        [_sum_over(key, _square_sum(parts)).to(device) for key, parts in spread.items()]
    ).sum()
    dtype = torch.float64 if any(g.dtype == torch.float64 for g in gradients) else torch.float32
    return total.sqrt().to(dtype)


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Factor of at most 1 that brings a gradient of this norm down to the limit.

    The small constant is that of `torch.nn.utils.clip_grad_norm_`. No synchronisation with the device.
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def scale_gradients_(parameters: Iterable[Tensor], factor: float | Tensor) -> None:
    """Multiply all gradients by a factor, in place."""
    by_device: dict[Any, list[Tensor]] = defaultdict(list)
    for p in parameters:
        if p.grad is not None:
            part = local(p.grad)
            by_device[part.device, part.dtype].append(part)
    for (device, dtype), parts in by_device.items():
        torch._foreach_mul_(parts, factor.to(device, dtype) if isinstance(factor, Tensor) else factor)


def _square_sum(parts: list[Tensor]) -> Tensor:
    """Sum of squares of tensors on this rank: an fp64 scalar."""
    dtype = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    if parts[0].device.type == "cpu":
        norms = [norm for part in parts for norm in _piece_norms(part, dtype)]
    else:
        norms = list(torch._foreach_norm(parts, 2.0, dtype))
    return torch.cat([norm.reshape(-1).double() for norm in norms]).square().sum()


def _piece_norms(part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    flat = part.reshape(-1)
    pieces = flat.numel() // PIECE
    head, tail = flat[: pieces * PIECE].view(pieces, PIECE), flat[pieces * PIECE :]
    return torch.linalg.vector_norm(head, dim=1, dtype=dtype), torch.linalg.vector_norm(tail, dtype=dtype)


def _sum_over(key: Any, value: Tensor) -> Tensor:
    """Sum over the ranks that hold different parts; ranks with equal parts are counted once."""
    if key is None:
        return value
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, sharded = key
    placements = [Partial() if s else Replicate() for s in sharded]
    return DTensor.from_local(value, mesh, placements, run_check=False).full_tensor()
