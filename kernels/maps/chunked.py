"""Distillation of attention maps in blocks of rows: a block of both maps is all that there ever is.

The gradient is computed in the forward, while a block is at hand, and the backward only scales it: a sample's loss is a
sum, so that its gradients are proportional to what comes in. No product is done twice.

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.slopes import learned
from headway.kernels.maps.divergences import DIVERGENCES, Divergence
from headway.kernels.maps.gradients import Gradients, Wanted
from headway.kernels.maps.operands import Scores, Seen
from headway.kernels.maps.pair import Pair
from headway.kernels.maps.walk import Block, walk


@torch.compiler.disable
def sums(teacher: Scores, student: Scores, loss: str, seen: Seen, rows_BQ: Tensor | None) -> Tensor:
    """Sum over a sample's rows of the mean over heads, [B]; see `operands.Sums`. Not twice differentiable."""
    bias = learned(student.bias)
    asked = (
        x is not None and x.requires_grad and torch.is_grad_enabled() for x in (student.q, student.k, bias)
    )
    out: Tensor = _Sums.apply(
        student.q, student.k, bias, teacher, student, loss, seen, rows_BQ, Wanted(*asked)
    )
    return out


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, bias, teacher, student, loss, seen, rows, wanted):
        pair, divergence = Pair.of(teacher, student), DIVERGENCES[loss]
        loss_B, slopes = _pass(pair, divergence, seen, rows, wanted)
        if any(wanted):
            ctx.save_for_backward(*slopes)
            ctx.dtypes = tuple(None if x is None else x.dtype for x in (q, k, bias))
        if wanted.bias:
            ctx.again = lambda weight_BQ: _pass(pair, divergence, seen, weight_BQ, wanted)[1]
            ctx.rows = q.new_ones(1, q.shape[2]) if rows is None else rows
        return loss_B

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_B):
        dq, dk, d_bias = ctx.saved_tensors
        if d_bias is not None and len(upstream_B):
            # A bias is shared by the samples, and so is its gradient: it scales only if they all are scaled alike.
            alike = bool((upstream_B == upstream_B[0]).all())
            d_bias = d_bias * upstream_B[0] if alike else ctx.again(upstream_B[:, None] * ctx.rows)[2]
        scaled = (None if x is None else x * upstream_B[:, None, None, None] for x in (dq, dk))
        found = zip((*scaled, d_bias), ctx.dtypes, strict=True)
        return *(None if x is None else x.to(dtype) for x, dtype in found), *[None] * 6


def _pass(
    pair: Pair, divergence: Divergence, seen: Seen, weight_BQ: Tensor | None, wanted: Wanted
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Loss [B] and its gradients by q, k and bias, over all blocks. `weight_BQ`: of rows, 1 if None."""
    student = pair.student
    loss_B = torch.zeros(len(student.q), dtype=pair.wide, device=student.q.device)
    gradients = Gradients(pair, wanted)
    for block in walk(student, seen):
        value_BHQ, centre, state = divergence.terms(*pair.weights(block, divergence))
        weight = _weight(block, divergence, weight_BQ, loss_B)
        loss_B[block.samples] += (value_BHQ if weight is None else value_BHQ * weight).sum((1, 2))
        if any(wanted):
            gradients.add(block, divergence.slope(state, centre), weight)
    share = 1 / student.q.shape[1]
    return loss_B * share, gradients.total(share * divergence.factor)


def _weight(block: Block, divergence: Divergence, weight_BQ: Tensor | None, like: Tensor) -> Tensor | None:
    """Weight of a block's rows, [1 or B, 1, 1 or Q]; None is 1."""
    weight = None if weight_BQ is None else weight_BQ[block.samples, None, block.queries]
    if not divergence.mean:
        return weight
    share = 1 / block.counts(like.device).to(like.dtype).clamp(min=1)
    return share if weight is None else share * weight
