"""Sums and exchanges over the tensor axis, as functions with gradients.

Without sequence parallelism a region that is cut is entered by f and left by g (Shoeybi et al. 2019, figure 3); with
it, by an all-gather and a reduce-scatter along the sequence (Korthikanti et al. 2022, section 4.2.2). The functional
collectives under them can be traced by the compiler.

Shapes: S places of a sequence, s of a rank: S over the ranks, rounded up; the last ones may be padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._dtensor_spec import DTensorSpec

_ops = torch.ops._c10d_functional


@dataclass
class Columns:
    """How a tower's sequence is cut: along dim 1, into equal parts.

    Attributes:
        group: name of the tensor axis' process group, what compiled graphs can hold.
        ranks, rank: of the axis, and this one's number.
        length: S of the tower's present forward.
        positions: the columns' places in the sequence, int64 [S], in a forward with noise.
    """

    group: str
    ranks: int
    rank: int
    length: int = 0
    positions: Tensor | None = None

    @property
    def width(self) -> int:
        """s"""
        return -(-self.length // self.ranks)


def total(x: Tensor, group: str, op: str = "sum") -> Tensor:
    """The sum (`max`, `min`) over ranks, without gradient; the same bits on all of them."""
    out: Tensor = _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group))
    return out


def enter(x: Tensor, group: str) -> Tensor:
    """x, which all ranks have alike and each uses for its share: the gradient is the sum of theirs (f)."""
    out: Tensor = _Pair.apply(x, group, _alike, total)
    return out


def leave(x: Tensor, group: str) -> Tensor:
    """The sum of x over ranks, which all go on with alike: its gradient is that of each (g)."""
    out: Tensor = _Pair.apply(x, group, total, _alike)
    return out


def enter_columns(x_BsE: Tensor, columns: Columns) -> Tensor:
    """All columns, of which each rank computes its share: the gradient is the sum of theirs, cut."""
    out: Tensor = _Pair.apply(x_BsE, columns, _gather, _reduce)
    return out


def leave_columns(x_BSE: Tensor, columns: Columns) -> Tensor:
    """This rank's columns of the sum over ranks."""
    out: Tensor = _Pair.apply(x_BSE, columns, _reduce, _gather)
    return out


def whole(x_BsE: Tensor, columns: Columns) -> Tensor:
    """All columns, with which all ranks go on alike: so is the gradient, of which this rank's columns are taken."""
    out: Tensor = _Pair.apply(x_BsE, columns, _gather, _cut)
    return out


def part(x_BSE: Tensor, columns: Columns) -> Tensor:
    """This rank's columns of what all have alike; the gradient is put together again."""
    out: Tensor = _Pair.apply(x_BSE, columns, _cut, _gather)
    return out


def local_part(parameter: DTensor, *, share: bool) -> Tensor:
    """This rank's part of a parameter on the tensor axis; `share`: of its gradient ranks have shares to be summed."""
    if torch.compiler.is_compiling():
        return parameter.to_local(grad_placements=[Partial()] if share else None)
    out: Tensor = _LocalPart.apply(parameter, share)
    return out


def _alike(x: Tensor, _: str) -> Tensor:
    return x.view_as(x)


def _padded(x_BSE: Tensor, columns: Columns) -> Tensor:
    return F.pad(x_BSE, (0, 0, 0, columns.width * columns.ranks - columns.length))


def _cut(x_BSE: Tensor, columns: Columns) -> Tensor:
    return _padded(x_BSE, columns)[:, columns.rank * columns.width :][:, : columns.width].contiguous()


def _gather(x_BsE: Tensor, columns: Columns) -> Tensor:
    """[B, s, E] of every rank -> [B, S, E]. The collective joins along dim 0."""
    rows, width, size = x_BsE.shape
    stacked = _ops.wait_tensor(_ops.all_gather_into_tensor(x_BsE.contiguous(), columns.ranks, columns.group))
    joined = stacked.view(columns.ranks, rows, width, size).transpose(0, 1).flatten(1, 2)
    return joined[:, : columns.length].contiguous()


def _reduce(x_BSE: Tensor, columns: Columns) -> Tensor:
    """Partial [B, S, E] -> this rank's columns of the sum."""
    stacked = _padded(x_BSE, columns).unflatten(1, (columns.ranks, columns.width)).transpose(0, 1)
    flat = stacked.flatten(0, 1).contiguous()
    out: Tensor = _ops.wait_tensor(_ops.reduce_scatter_tensor(flat, "sum", columns.ranks, columns.group))
    return out


class _Pair(torch.autograd.Function):
    """A way there for values, and the way back for their gradients; compilers see through both."""

    @staticmethod
    def forward(ctx, x, along, there, back):
        ctx.along, ctx.back = along, back
        return there(x, along)

    @staticmethod
    def backward(ctx, g):
        return ctx.back(g, ctx.along), None, None, None


class _LocalPart(torch.autograd.Function):
    """`DTensor.to_local`, whose way back takes 0.2 ms for every parameter on a CPU: it works out a layout anew that is
    the parameter's own."""

    @staticmethod
    def forward(ctx, parameter, share):
        ctx.spec = parameter._spec
        if share:
            ctx.spec = DTensorSpec(ctx.spec.mesh, (Partial(),), tensor_meta=ctx.spec.tensor_meta)
        local = parameter.to_local()
        return local.view_as(local)

    @staticmethod
    def backward(ctx, g):
        return DTensor(g.contiguous(), ctx.spec, requires_grad=False), None
