"""Sums of squares of tensors, good to fp32's last digits on every device, and whole over all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headway.pretrain.optim.sharded import axes, summed

PIECE = 1024
"""Elements whose squares a CPU sums in fp32 at once. PyTorch's CPU reduction keeps so few running sums that
the fp32 norm of 5e7 elements is 0.2% too small; sums of pieces, added in fp64, are good to some 1e-7."""


def whole_square_sums(parts: Sequence[Tensor], likes: Sequence[Tensor]) -> list[Tensor]:
    """Sum of squares of each whole tensor, of which `parts` are this rank's shares, spread as `likes` are.

    Returns: fp64 scalars, equal on all ranks; one all-reduce for each distinct mesh and way of spreading.
    """
    if parts and parts[0].device.type != "cpu":
        norms = torch._foreach_norm(list(parts), 2.0, _dtype(parts))
        squares = list(torch.stack(norms).double().square().unbind())
    else:
        squares = [square_sum([part]) for part in parts]
    return summed(squares, [axes(like) for like in likes])


def square_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum of squares of tensors on this rank: an fp64 scalar. Squares are summed in fp32 (fp64 of fp64)."""
    dtype = _dtype(parts)
    if parts[0].device.type == "cpu":
        norms = torch.cat([norm.reshape(-1).double() for part in parts for norm in _piece_norms(part, dtype)])
    else:  # few kernels: a GPU waits for them
        norms = torch.stack(torch._foreach_norm(list(parts), 2.0, dtype)).double()
    return norms.square().sum()


def _dtype(parts: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32


def _piece_norms(part: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    flat = part.reshape(-1)
    pieces = flat.numel() // PIECE
    head, tail = flat[: pieces * PIECE].view(pieces, PIECE), flat[pieces * PIECE :]
    return torch.linalg.vector_norm(head, dim=1, dtype=dtype), torch.linalg.vector_norm(tail, dtype=dtype)
