"""Products of sorted rows, each group with a weight of its own, and the moves of rows in and out of groups.

Shapes: N tokens, R rows (a token stands in as many as it has experts), X groups, E width in, F width out.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.fused import fused

_ALIGNED = 16  # bytes: torch's grouped product takes strides that are multiples of it
_CACHED = 1 << 16  # elements


def linear(x_RE: Tensor, w_XFE: Tensor, bias_XF: Tensor | None, ends_X: Tensor) -> Tensor:
    """Rows [ends[i - 1], ends[i]) times w[i]^T, plus bias[i].

    Args:
        x_RE: rows, sorted by group.
        w_XFE, bias_XF: of any dtype; products are of x's.
        ends_X: int64, where every group ends. Rows after the last are in no group: they give zeros, and take no
            gradient whatever they hold.

    Returns:
        [R, F]. A group without rows has a zero gradient.
    """
    if fused(x_RE, w_XFE, bias_XF) and not _natively(x_RE, w_XFE):
        from headway.kernels.triton import grouped as fast

        return fast.linear(x_RE, w_XFE, bias_XF, ends_X)
    if x_RE.device.type == "cuda":
        return native(x_RE, w_XFE, bias_XF, ends_X)
    out: Tensor = _linear(x_RE, w_XFE, bias_XF, ends_X)
    return out


def rule(x: Tensor, *widths: int) -> str | None:
    """What forbids `linear` of rows like x and of these widths; None if nothing does."""
    if x.device.type != "cuda" or fused(x):
        return None
    return native_rule(x.dtype, *widths)


def _natively(x_RE: Tensor, w_XFE: Tensor) -> bool:
    """Whether torch's grouped product is the better one: in bf16 on GPUs since sm_90, which have a kernel for it."""
    if x_RE.device.type != "cuda" or x_RE.dtype != torch.bfloat16 or torch.version.hip:
        return False
    modern = torch.cuda.get_device_capability(x_RE.device) >= (9, 0)
    return modern and native_rule(x_RE.dtype, *w_XFE.shape[1:]) is None


def native_rule(dtype: torch.dtype, *widths: int) -> str | None:
    """What forbids torch's grouped product of this dtype and widths; None if nothing does."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return "torch's grouped product takes fp32, bf16 and fp16"
    multiple = _ALIGNED // dtype.itemsize
    if any(width % multiple for width in widths):
        return f"torch's grouped product takes widths that are multiples of {multiple}, not {widths}"
    return None


def native(x_RE: Tensor, w_XFE: Tensor, bias_XF: Tensor | None, ends_X: Tensor) -> Tensor:
    """`linear` by torch's grouped product: one kernel for all groups on a GPU, a loop as below on CPU."""
    places_R = torch.arange(x_RE.shape[0], device=x_RE.device)
    inside_R1 = (places_R < ends_X[-1])[:, None]
    x_RE = torch.where(inside_R1, x_RE, 0)  # its backward cuts off the rows that the product leaves unwritten
    y_RF = F.grouped_mm(x_RE, w_XFE.to(x_RE.dtype).mT, offs=ends_X.to(torch.int32))
    if bias_XF is not None:
        group_R = torch.searchsorted(ends_X, places_R, right=True).clamp(max=len(ends_X) - 1)
        y_RF = y_RF + bias_XF.to(x_RE.dtype).index_select(0, group_R)
    return torch.where(inside_R1, y_RF, 0)


# On CPU torch's grouped product is a loop over groups too, and takes no fp64, no bias and no odd widths. As an
# operator of our own the loop takes them, and compiles without a break of the graph.


@torch.library.custom_op("headway::grouped_linear", mutates_args=())
def _linear(x_RE: Tensor, w_XFE: Tensor, bias_XF: Tensor | None, ends_X: Tensor) -> Tensor:
    y_RF = x_RE.new_empty(x_RE.shape[0], w_XFE.shape[1])
    for i, rows in _groups(ends_X):
        w_EF = w_XFE[i].to(x_RE.dtype).T  # cast here, where it stays in the cache
        if bias_XF is None:
            torch.mm(x_RE[rows], w_EF, out=y_RF[rows])
        else:
            torch.addmm(bias_XF[i].to(x_RE.dtype), x_RE[rows], w_EF, out=y_RF[rows])
    y_RF[int(ends_X[-1]) :] = 0
    return y_RF


@_linear.register_fake
def _(x_RE, w_XFE, bias_XF, ends_X):
    return x_RE.new_empty(x_RE.shape[0], w_XFE.shape[1])


@torch.library.custom_op("headway::grouped_linear_backward", mutates_args=())
def _linear_backward(
    g_RF: Tensor, x_RE: Tensor, w_XFE: Tensor, ends_X: Tensor, bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx_RE, dw_XFE = torch.empty_like(x_RE), torch.empty_like(w_XFE)
    db_XF = w_XFE.new_empty(w_XFE.shape[:2] if bias else 0)
    for i, rows in _groups(ends_X):
        torch.mm(g_RF[rows], w_XFE[i].to(g_RF.dtype), out=dx_RE[rows])
        if w_XFE.dtype == g_RF.dtype:
            torch.mm(g_RF[rows].T, x_RE[rows], out=dw_XFE[i])  # zeros where there are no rows
        else:
            dw_XFE[i] = g_RF[rows].T @ x_RE[rows]
        if bias:
            torch.sum(g_RF[rows], 0, dtype=w_XFE.dtype, out=db_XF[i])
    dx_RE[int(ends_X[-1]) :] = 0
    return dx_RE, dw_XFE, db_XF


@_linear_backward.register_fake
def _(g_RF, x_RE, w_XFE, ends_X, bias):
    db_XF = w_XFE.new_empty(w_XFE.shape[:2] if bias else 0)
    return torch.empty_like(x_RE), torch.empty_like(w_XFE), db_XF


def _groups(ends_X: Tensor) -> Iterator[tuple[int, slice]]:
    start = 0
    for i, end in enumerate(ends_X.tolist()):
        yield i, slice(start, end)
        start = end


def _linear_setup(ctx, inputs, output):
    x_RE, w_XFE, bias_XF, ends_X = inputs
    ctx.save_for_backward(x_RE, w_XFE, ends_X)
    ctx.bias = bias_XF is not None


def _linear_autograd(ctx, g_RF):
    dx_RE, dw_XFE, db_XF = _linear_backward(g_RF.contiguous(), *ctx.saved_tensors, ctx.bias)
    return dx_RE, dw_XFE, db_XF if ctx.bias else None, None


_linear.register_autograd(_linear_autograd, setup_context=_linear_setup)


def take_rows(x_NE: Tensor, token_R: Tensor) -> Tensor:
    """x[token], [R, E]."""
    if fused(x_NE):
        from headway.kernels.triton import experts as fast

        return fast.take_rows(x_NE, token_R, fast.copies(token_R, len(x_NE)))
    out: Tensor = _Take.apply(x_NE, token_R)
    return out


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE, token_R):
        ctx.save_for_backward(token_R)
        ctx.count = x_NE.shape[0]
        return x_NE.index_select(0, token_R)

    @staticmethod
    def backward(ctx, g_RE):
        (token_R,) = ctx.saved_tensors
        ones_R = torch.ones_like(token_R, dtype=torch.promote_types(g_RE.dtype, torch.float32))
        return combine_rows(g_RE, ones_R, token_R, ctx.count), None


def combine_rows(y_RE: Tensor, weight_R: Tensor, token_R: Tensor, count: int) -> Tensor:
    """Weighted sum of the rows of every token, added in the order of rows on CPU, and on GPUs that have Triton.

    Args:
        weight_R: fp32 or wider; sums are of its dtype.
        token_R: int64 in [0, count), the token of each row.

    Returns:
        [count, E] in the dtype of y; zeros for tokens without rows.
    """
    if fused(y_RE, weight_R):
        from headway.kernels.triton import experts as fast

        return fast.combine_rows(y_RE, weight_R, token_R, fast.copies(token_R, count))
    out: Tensor = _combine_rows(y_RE, weight_R, token_R, count)
    return out


# An operator of its own because compiled code would add rows by atomics, in any order.


@torch.library.custom_op("headway::combine_rows", mutates_args=())
def _combine_rows(y_RE: Tensor, weight_R: Tensor, token_R: Tensor, count: int) -> Tensor:
    out_NE = weight_R.new_zeros(count, y_RE.shape[1])
    for rows in _chunks(y_RE):
        out_NE.index_add_(0, token_R[rows], y_RE[rows] * weight_R[rows, None])
    return out_NE.to(y_RE.dtype)


@_combine_rows.register_fake
def _(y_RE, weight_R, token_R, count):
    return y_RE.new_empty(count, y_RE.shape[1])


@torch.library.custom_op("headway::combine_rows_backward", mutates_args=())
def _combine_rows_backward(
    g_NE: Tensor, y_RE: Tensor, weight_R: Tensor, token_R: Tensor
) -> tuple[Tensor, Tensor]:
    dy_RE, dweight_R = torch.empty_like(y_RE), torch.empty_like(weight_R)
    for rows in _chunks(y_RE):
        g_RE = g_NE.index_select(0, token_R[rows]).to(weight_R.dtype)
        dweight_R[rows] = (g_RE * y_RE[rows]).sum(1)
        dy_RE[rows] = g_RE.mul_(weight_R[rows, None])
    return dy_RE, dweight_R


@_combine_rows_backward.register_fake
def _(g_NE, y_RE, weight_R, token_R):
    return torch.empty_like(y_RE), torch.empty_like(weight_R)


def _chunks(y_RE: Tensor) -> Iterator[slice]:
    """Rows that are treated at once: on CPU as many as a core's cache holds."""
    rows, width = y_RE.shape
    step = max(1, _CACHED // width) if y_RE.device.type == "cpu" else max(1, rows)
    for start in range(0, rows, step):
        yield slice(start, start + step)


_combine_rows.register_autograd(
    lambda ctx, g_NE: (*_combine_rows_backward(g_NE, *ctx.saved_tensors), None, None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:3]),
)
