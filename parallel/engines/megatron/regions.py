"""Entering and leaving what is computed by shares along the tensor axis, through Megatron-Core's mappings.

One collective serves all linears that read one input (queries, keys and values; gate and up), where Megatron's own
layers would have one for each. Sequences lie along dim 0 for Megatron's mappings and along dim 1 for us: with sequence
parallelism a transposed copy is made on one side of each collective, which is the copy that joining along dim 1 takes
anyway (`headway.parallel.tensor.collectives`).

Megatron's `_reduce` works in place. Of what is not contiguous in memory it reduces a copy, and goes on with what it was
given; and a gradient that autograd has given to others as well is changed for all of them. So it gets contiguous
tensors of its own, from here and from autograd.

Shapes: B batch, S sequence, s places of a rank (S over the ranks, rounded up), E hidden size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel import mappings
from torch import Tensor

from headway.parallel.tensor.collectives import Columns


def enter(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x, which all ranks have alike and each uses for its share; gradients are summed."""
    out: Tensor = _Dense.apply(mappings.copy_to_tensor_model_parallel_region(x, group))
    return out


def leave(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of x over ranks, which all go on with alike."""
    out: Tensor = mappings.reduce_from_tensor_model_parallel_region(x.contiguous(), group)
    return out


def enter_columns(x_BsE: Tensor, columns: Columns, group: dist.ProcessGroup) -> Tensor:
    """All columns, of which each rank computes its share; gradients are summed and cut."""
    x_SBE = mappings.gather_from_sequence_parallel_region(x_BsE.transpose(0, 1), group=group)
    return x_SBE.transpose(0, 1)[:, : columns.length]


def leave_columns(x_BSE: Tensor, columns: Columns, group: dist.ProcessGroup) -> Tensor:
    """This rank's columns of the sum over ranks."""
    padded = F.pad(x_BSE, (0, 0, 0, columns.width * columns.ranks - columns.length))
    x_sBE = mappings.reduce_scatter_to_sequence_parallel_region(padded.transpose(0, 1), group=group)
    return x_sBE.transpose(0, 1).contiguous()


class _Dense(torch.autograd.Function):
    """The identity, whose gradient is contiguous and nobody else's: the all-reduce behind it works in place."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return g.clone(memory_format=torch.contiguous_format)
