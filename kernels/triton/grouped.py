"""Products of sorted rows, each group with a weight of its own: what `kernels.grouped.linear` computes.

torch's grouped product is as good or better where it runs, and the choice is to be its: on a GPU since sm_90 in bf16.
Ours exists for what it refuses: fp32, odd widths, groups that end anywhere, and GPUs before sm_90. Products of fp32 are
exact to fp32 (no tf32).

A tile has rows of one group. A program finds its own from the ends of groups, so that the host need not know them; it
takes the smallest number of tiles that suffices for any. Rows are read once for each tile of columns, weights once for
each tile of rows, as in any product of matrices, and mostly from the cache: programs that run together have eight tiles
of rows by some of columns. Backward, d_x = d_y w is the same kernel; d_w = d_y^T x has programs that own tiles of a
group's weight, and add its rows in order; d_bias reads d_y once more, because a sum beside the product would take
registers from every program for what one column of them needs.

Shapes: R rows, X groups, E width in, F width out; in kernels M rows, N outputs and K inputs of a tile.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.triton.map_tiles import wide
from headway.kernels.triton.numbers import narrowed, operand
from headway.kernels.triton.tuning import Config, Space

_BAND = tl.constexpr(8)


def _product_configs(target: str, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [Config({"M": 64, "N": 64, "K": 16}, 4, 2), Config({"M": 32, "N": 64, "K": 16}, 4, 2)]
    depth = 32 if target == "sm_80" else 64
    stages = 2 if target == "gfx942" else 3
    return [
        Config({"M": 128, "N": 128, "K": depth}, 8, stages),
        Config({"M": 64, "N": 64 if target == "sm_80" else 128, "K": depth}, 4, stages),
    ]


def _weight_configs(target: str, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [Config({"M": 16, "N": 64, "K": 64}, 4, 2), Config({"M": 16, "N": 64, "K": 32}, 4, 2)]
    depth = 32 if target == "sm_80" else 64
    stages = 2 if target == "gfx942" else 3
    return [
        Config({"M": depth, "N": 128, "K": 128}, 8, stages),
        Config({"M": depth, "N": 64, "K": 128}, 4, stages),
    ]


def _bias_configs(target: str, itemsize: int) -> list[Config]:
    return [Config({"M": 32, "N": 64}, 4, 1), Config({"M": 16, "N": 64}, 2, 1)]


PRODUCT = Space("grouped_product", _product_configs)
WEIGHT = Space("grouped_weight", _weight_configs)
BIAS = Space("grouped_bias", _bias_configs)

DTYPES = torch.float32, torch.bfloat16, torch.float16


@torch.compiler.disable  # Triton compiles the kernels itself
def linear(x_RE: Tensor, w_XFE: Tensor, bias_XF: Tensor | None, ends_X: Tensor) -> Tensor:
    """Rows [ends[i - 1], ends[i]) times w[i]^T, plus bias[i], [R, F].

    Args:
        x_RE: rows, sorted by group.
        w_XFE, bias_XF: of any dtype; products are of x's. Gradients of w are of its own, from sums in fp32.
        ends_X: int64, where every group ends. Rows after the last are in no group: they give zeros, and take no
            gradient whatever they hold.

    Raises:
        ValueError: x is of fp64, or widths differ.
    """
    if x_RE.dtype not in DTYPES:
        raise ValueError(f"x is of {x_RE.dtype}: fp32, bf16 or fp16; the nearest is kernels.grouped.linear")
    if x_RE.shape[1] != w_XFE.shape[2]:
        raise ValueError(f"x has width {x_RE.shape[1]}, w {w_XFE.shape[2]}: they must be equal")
    y: Tensor = _Linear.apply(x_RE, w_XFE, bias_XF, ends_X)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RE, w_XFE, bias_XF, ends_X):
        x_RE, narrow_XFE = x_RE.contiguous(), w_XFE.to(x_RE.dtype).contiguous()
        ctx.save_for_backward(x_RE, narrow_XFE, ends_X)
        ctx.dtypes = w_XFE.dtype, None if bias_XF is None else bias_XF.dtype
        return _product(x_RE, narrow_XFE, None if bias_XF is None else bias_XF.contiguous(), ends_X)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RF):
        x_RE, w_XFE, ends_X = ctx.saved_tensors
        d_RF = d_RF.contiguous()
        dx_RE = _product(d_RF, w_XFE.mT, None, ends_X) if ctx.needs_input_grad[0] else None
        dw_XFE = _weight(d_RF, x_RE, ends_X, ctx.dtypes[0]) if ctx.needs_input_grad[1] else None
        db_XF = _bias(d_RF, ends_X, ctx.dtypes[1]) if ctx.needs_input_grad[2] else None
        return dx_RE, dw_XFE, db_XF, None


def _product(x_RE: Tensor, w_XFE: Tensor, bias_XF: Tensor | None, ends_X: Tensor) -> Tensor:
    rows, inner = x_RE.shape
    groups, outer, _ = w_XFE.shape
    y_RF = x_RE.new_empty(rows, outer)
    config = PRODUCT.choose(x_RE.device, itemsize=x_RE.element_size())
    tile = config.tiles["M"]
    # Every group, and what is after the last, may end inside a tile.
    grid = ((rows + (groups + 1) * (tile - 1)) // tile * triton.cdiv(outer, config.tiles["N"]),)
    given = x_RE, w_XFE, bias_XF, y_RF, ends_X, rows, groups, inner, outer, *w_XFE.stride()
    with torch.cuda.device_of(x_RE):
        grouped_product_kernel[grid](*given, XP=triton.next_power_of_2(groups + 1), **config.options)
    return y_RF


def _weight(d_RF: Tensor, x_RE: Tensor, ends_X: Tensor, dtype: torch.dtype) -> Tensor:
    groups, outer, inner = len(ends_X), d_RF.shape[1], x_RE.shape[1]
    dw_XFE = x_RE.new_empty(groups, outer, inner, dtype=dtype)
    config = WEIGHT.choose(x_RE.device, itemsize=x_RE.element_size())
    grid = (groups * triton.cdiv(outer, config.tiles["N"]) * triton.cdiv(inner, config.tiles["K"]),)
    with torch.cuda.device_of(x_RE):
        grouped_weight_kernel[grid](d_RF, x_RE, dw_XFE, ends_X, inner, outer, **config.options)
    return dw_XFE


def _bias(d_RF: Tensor, ends_X: Tensor, dtype: torch.dtype) -> Tensor:
    groups, outer = len(ends_X), d_RF.shape[1]
    db_XF = d_RF.new_empty(groups, outer, dtype=dtype)
    config = BIAS.choose(d_RF.device, itemsize=d_RF.element_size())
    with torch.cuda.device_of(d_RF):
        grouped_bias_kernel[groups * triton.cdiv(outer, config.tiles["N"]),](
            d_RF, db_XF, ends_X, outer, **config.options
        )
    return db_XF


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def grouped_product_kernel(
    x,
    w,
    bias,
    y,
    ends,
    rows,
    groups,
    inner,
    outer,
    w_group,
    w_outer,
    w_inner,
    XP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
):
    """A program: M rows of a group and N columns of y."""
    t, block = _banded(tl.cdiv(outer, N))
    group, start, stop = _tile(t, ends, rows, groups, M, XP)
    row = start + tl.arange(0, M)
    column = block * N + tl.arange(0, N)
    step = tl.arange(0, K)
    known, there = row < stop, column < outer
    x_at = x + wide(row)[:, None] * inner + step[None, :]
    w_at = w + wide(group) * w_group + wide(column)[:, None] * w_outer + wide(step)[None, :] * w_inner
    total = tl.zeros([M, N], tl.float32)
    for first in range(0, tl.where(group < groups, inner, 0), K):
        inside = (step < inner - first)[None, :]
        x_MK = tl.load(x_at + first, mask=known[:, None] & inside, other=0.0)
        w_NK = tl.load(w_at + wide(first) * w_inner, mask=there[:, None] & inside, other=0.0)
        total = tl.dot(operand(x_MK), tl.trans(operand(w_NK)), total, input_precision="ieee")
    if bias is not None:
        limit = tl.where(group < groups, outer, 0)
        shift = tl.load(bias + wide(group) * outer + column, mask=column < limit, other=0.0)
        total += shift.to(tl.float32)[None, :]
    place = wide(row)[:, None] * outer + column[None, :]
    tl.store(y + place, narrowed(total, y.dtype.element_ty), mask=known[:, None] & there[None, :])


@triton.jit
def grouped_weight_kernel(d_y, x, d_w, ends, inner, outer, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """A program: N rows and K columns of a group's gradient, M of the group's rows after M."""
    n_blocks, k_blocks = tl.cdiv(outer, N), tl.cdiv(inner, K)
    group = tl.program_id(0) // (n_blocks * k_blocks)
    output = tl.program_id(0) // k_blocks % n_blocks * N + tl.arange(0, N)
    column = tl.program_id(0) % k_blocks * K + tl.arange(0, K)
    start, stop = _bounds(ends, group)
    total = tl.zeros([N, K], tl.float32)
    for first in range(start, stop, M):
        row = first + tl.arange(0, M)
        known = (row < stop)[:, None]
        d_at = d_y + wide(row)[:, None] * outer + output[None, :]
        x_at = x + wide(row)[:, None] * inner + column[None, :]
        d_MN = tl.load(d_at, mask=known & (output < outer)[None, :], other=0.0)
        x_MK = tl.load(x_at, mask=known & (column < inner)[None, :], other=0.0)
        total = tl.dot(tl.trans(operand(d_MN)), operand(x_MK), total, input_precision="ieee")
    place = (wide(group) * outer + output)[:, None] * inner + column[None, :]
    inside = (output < outer)[:, None] & (column < inner)[None, :]
    tl.store(d_w + place, narrowed(total, d_w.dtype.element_ty), mask=inside)


@triton.jit
def grouped_bias_kernel(d_y, d_bias, ends, outer, M: tl.constexpr, N: tl.constexpr):
    """A program: N columns of a group, M rows after M."""
    blocks = tl.cdiv(outer, N)
    group = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * N + tl.arange(0, N)
    start, stop = _bounds(ends, group)
    total = tl.zeros([N], tl.float32)
    for first in range(start, stop, M):
        row = first + tl.arange(0, M)
        inside = (row < stop)[:, None] & (column < outer)[None, :]
        d_MN = tl.load(d_y + wide(row)[:, None] * outer + column[None, :], mask=inside, other=0.0)
        total += tl.sum(d_MN.to(tl.float32), 0)
    sums = narrowed(total, d_bias.dtype.element_ty)
    tl.store(d_bias + wide(group) * outer + column, sums, mask=column < outer)


@triton.jit
def _banded(blocks):
    """This program's tile of rows and block of columns: bands of eight tiles by all columns, one after the other."""
    tiles = tl.num_programs(0) // blocks
    band = tl.program_id(0) // (_BAND * blocks)
    inside = tl.program_id(0) % (_BAND * blocks)
    size = tl.minimum(tiles - band * _BAND, _BAND)
    return band * _BAND + inside % size, inside // size


@triton.jit
def _tile(t, ends, rows, groups, M: tl.constexpr, XP: tl.constexpr):
    """The group of tile t, its first row, and where its group stops.

    The rows after the last group are a group too, number `groups`; beyond all tiles, a number above, and no rows.
    """
    index = tl.arange(0, XP)
    end = tl.load(ends + index, mask=index < groups, other=0).to(tl.int32)
    end = tl.where(index < groups, end, rows)
    begin = tl.load(ends + index - 1, mask=(index > 0) & (index <= groups), other=0).to(tl.int32)
    begin = tl.where(index > groups, rows, begin)
    tiles = (end - begin + M - 1) // M
    last = tl.cumsum(tiles, 0)
    group = tl.sum((last <= t).to(tl.int32), 0)
    mine = index == group
    start = tl.sum(tl.where(mine, begin + (t - last + tiles) * M, 0), 0)
    return group, start, tl.sum(tl.where(mine, end, 0), 0)


@triton.jit
def _bounds(ends, group):
    """Where a group's rows start and stop."""
    start = tl.load(ends + group - 1, mask=group > 0, other=0)
    return start.to(tl.int32), tl.load(ends + group).to(tl.int32)
