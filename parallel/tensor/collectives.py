"""Sums over the tensor axis, as functions with gradients (Shoeybi et al. 2019, figure 3: f and g).

The functional collectives under them can be traced by the compiler.
"""

from __future__ import annotations

import torch
from torch import Tensor

Group = str
"""Name of a process group: what compiled graphs can hold."""


def total(x: Tensor, group: Group, op: str = "sum") -> Tensor:
    """The sum (`max`, `min`) over ranks, without gradient; the same bits on all of them."""
    ops = torch.ops._c10d_functional
    out: Tensor = ops.wait_tensor(ops.all_reduce(x.contiguous(), op, group))
    return out


def enter(x: Tensor, group: Group) -> Tensor:
    """x, which all ranks have alike and each uses for its share: the gradient is the sum of theirs (f)."""
    out: Tensor = _Enter.apply(x, group)
    return out


def leave(x: Tensor, group: Group) -> Tensor:
    """The sum of x over ranks, which all go on with alike: its gradient is that of each (g)."""
    out: Tensor = _Leave.apply(x, group)
    return out


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return total(g, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        return total(x, group)

    @staticmethod
    def backward(ctx, g):
        return g, None
