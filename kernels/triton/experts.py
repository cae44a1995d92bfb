"""Moves of rows into experts' groups and back, with what is summed on the way: those of `kernels.grouped`.

`places` says where pairs of tokens and experts stand: sorted by expert, groups padded to a multiple of a tile, so that
no tile has rows of two experts. `take_rows` fills the groups, zeros between them; `combine_rows` gives each token the
weighted sum of its rows. PyTorch adds rows by atomics, in any order, or makes [R, E] of products first; here a token's
program adds its rows in the order in which they stand, in fp32, so that results are the same every time.

Rows of tokens lie anywhere, so of E numbers each; what is read of `x` by `take_rows`, and of the gradient by the
backward of `combine_rows`, is read once for each of a token's experts, because their rows are written so many times.

Shapes: N tokens, P pairs, R rows, X experts, E width; in kernels M rows and C columns of a tile.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.triton.map_tiles import wide
from headway.kernels.triton.numbers import narrowed
from headway.kernels.triton.targets import TARGETS
from headway.kernels.triton.tuning import Config, Space


def _row_configs(target: str, width: int) -> list[Config]:
    columns = min(width, 512)
    return [
        Config({"M": 2048 // columns, "C": columns}, 4, 1),
        Config({"M": 1024 // columns, "C": columns}, 2, 1),
    ]


def _token_configs(target: str, width: int) -> list[Config]:
    at_once = 8 * TARGETS[target].lanes  # columns of a warp: 16 bytes of 16-bit numbers a thread
    return [
        Config({"C": columns}, max(1, columns // at_once), 1)
        for columns in (min(width, 1024), min(width, 512))
    ]


TAKE = Space("experts_take", _row_configs)
COMBINE = Space("experts_combine", _token_configs)
SPREAD = Space("experts_spread", _row_configs)


class Places(NamedTuple):
    """Where pairs stand, by `places`.

    Attributes:
        row_P: int64, the row of a pair; R where it is not computed.
        ends_X: int64, where each group ends, padding included.
        rows: R, for all groups at their widest.
    """

    row_P: Tensor
    ends_X: Tensor
    rows: int

    def of_rows(self, value_P: Tensor, empty: float = 0) -> Tensor:
        """What rows have, [R], of what pairs have; `empty` where no pair stands."""
        return value_P.new_full((self.rows + 1,), empty).scatter(0, self.row_P, value_P)[:-1]


class Copies(NamedTuple):
    """The rows of every token, in order: rows `row_R[start_N1[n] : start_N1[n + 1]]`."""

    row_R: Tensor
    start_N1: Tensor


def places(expert_P: Tensor, experts: int, multiple: int) -> Places:
    """Where pairs stand: sorted by expert, pairs of one in their order, each group padded to a multiple of rows.

    Nothing waits for the device: there are as many rows as any choice of experts may need.

    Args:
        expert_P: int64; `experts` where a pair is not computed.
    """
    sorted_P, order_P = expert_P.sort(stable=True)
    ends_X = torch.searchsorted(sorted_P, torch.arange(experts, device=expert_P.device), right=True)
    counts_X = ends_X.diff(prepend=ends_X.new_zeros(1))
    padded_X = (counts_X + multiple - 1) // multiple * multiple
    shift_X = (padded_X - counts_X).cumsum(0) - (padded_X - counts_X)  # padding of the groups before
    rows = (len(expert_P) + experts * (multiple - 1)) // multiple * multiple
    known_P = sorted_P < experts
    place_P = torch.arange(len(expert_P), device=expert_P.device) + shift_X[sorted_P.clamp(max=experts - 1)]
    row_P = torch.empty_like(place_P).scatter(0, order_P, torch.where(known_P, place_P, rows))
    return Places(row_P, padded_X.cumsum(0), rows)


def copies(token_R: Tensor, count: int) -> Copies:
    """The rows of every token of `count`.

    Args:
        token_R: int64, each row's token; negative where there is none.
    """
    sorted_R, row_R = token_R.sort(stable=True)
    return Copies(row_R, torch.searchsorted(sorted_R, torch.arange(count + 1, device=token_R.device)))


@torch.compiler.disable  # Triton compiles the kernels itself
def take_rows(x_NE: Tensor, token_R: Tensor, copies: Copies) -> Tensor:
    """x[token], [R, E]; zeros where the token is negative. `copies`: those of the tokens."""
    y: Tensor = _Take.apply(x_NE.contiguous(), token_R, copies)
    return y


@torch.compiler.disable  # as above
def combine_rows(y_RE: Tensor, weight_R: Tensor, token_R: Tensor, copies: Copies) -> Tensor:
    """Weighted sum of the rows of every token, [N, E] in the dtype of y, zeros for tokens without rows.

    Args:
        weight_R: of any dtype; sums are of fp32.
        token_R: int64, the token of each row; negative where there is none: such rows take no gradient.
        copies: those of the tokens, which say how many there are.
    """
    y: Tensor = _Combine.apply(y_RE.contiguous(), weight_R.contiguous(), token_R, copies)
    return y


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NE, token_R, copies):
        ctx.copies = copies
        y_RE = x_NE.new_empty(len(token_R), x_NE.shape[1])
        config = TAKE.choose(x_NE.device, width=triton.next_power_of_2(x_NE.shape[1]))
        with torch.cuda.device_of(x_NE):
            experts_take_kernel[_row_grid(y_RE, config)](x_NE, token_R, y_RE, *y_RE.shape, **config.options)
        return y_RE

    @staticmethod
    @once_differentiable
    def backward(ctx, d_RE):
        return _sums(d_RE.contiguous(), None, ctx.copies), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RE, weight_R, token_R, copies):
        ctx.save_for_backward(y_RE, weight_R, token_R)
        return _sums(y_RE, weight_R, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_NE):
        y_RE, weight_R, token_R = ctx.saved_tensors
        d_RE, d_weight_R = torch.empty_like(y_RE), torch.empty_like(weight_R)
        config = SPREAD.choose(y_RE.device, width=triton.next_power_of_2(y_RE.shape[1]))
        given = d_NE.contiguous(), y_RE, weight_R, token_R, d_RE, d_weight_R, *y_RE.shape
        with torch.cuda.device_of(y_RE):
            experts_spread_kernel[triton.cdiv(len(y_RE), config.tiles["M"]),](*given, **config.options)
        return d_RE, d_weight_R, None, None


def _sums(y_RE: Tensor, weight_R: Tensor | None, copies: Copies) -> Tensor:
    count, width = len(copies.start_N1) - 1, y_RE.shape[1]
    out_NE = y_RE.new_empty(count, width)
    config = COMBINE.choose(y_RE.device, width=triton.next_power_of_2(width))
    grid = (count * triton.cdiv(width, config.tiles["C"]),)
    with torch.cuda.device_of(y_RE):
        experts_combine_kernel[grid](y_RE, weight_R, *copies, out_NE, width, **config.options)
    return out_NE


def _row_grid(y_RE: Tensor, config: Config) -> tuple[int]:
    rows, width = y_RE.shape
    return (triton.cdiv(rows, config.tiles["M"]) * triton.cdiv(width, config.tiles["C"]),)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def experts_take_kernel(x, token, y, rows, width, M: tl.constexpr, C: tl.constexpr):
    """A program: M rows and C columns."""
    blocks = tl.cdiv(width, C)
    row = tl.program_id(0) // blocks * M + tl.arange(0, M)
    column = tl.program_id(0) % blocks * C + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    source = tl.load(token + row, mask=row < rows, other=-1)
    taken = tl.load(
        x + source[:, None] * width + column[None, :], mask=inside & (source >= 0)[:, None], other=0.0
    )
    tl.store(y + wide(row)[:, None] * width + column[None, :], taken, mask=inside)


@triton.jit
def experts_combine_kernel(y, weight, row, start, out, width, C: tl.constexpr):
    """A program: C columns of a token, row after row. Without weights, all are 1."""
    blocks = tl.cdiv(width, C)
    n = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * C + tl.arange(0, C)
    there = column < width
    total = tl.zeros([C], tl.float32)
    for i in range(tl.load(start + n).to(tl.int32), tl.load(start + n + 1).to(tl.int32)):
        r = tl.load(row + i)
        value = tl.load(y + r * width + column, mask=there, other=0.0).to(tl.float32)
        if weight is not None:
            value *= tl.load(weight + r).to(tl.float32)
        total += value
    tl.store(out + wide(n) * width + column, narrowed(total, out.dtype.element_ty), mask=there)


@triton.jit
def experts_spread_kernel(
    d_out, y, weight, token, d_y, d_weight, rows, width, M: tl.constexpr, C: tl.constexpr
):
    """A program: M rows, C columns after C columns: the gradients of rows and of their weights."""
    row = tl.program_id(0) * M + tl.arange(0, M)
    known = row < rows
    source = tl.load(token + row, mask=known, other=-1)
    factor = tl.load(weight + row, mask=known, other=0.0).to(tl.float32)[:, None]
    total = tl.zeros([M, C], tl.float32)
    for first in range(0, width, C):
        column = first + tl.arange(0, C)
        inside = known[:, None] & (column < width)[None, :]
        filled = inside & (source >= 0)[:, None]
        place = wide(row)[:, None] * width + column[None, :]
        slope = tl.load(d_out + source[:, None] * width + column[None, :], mask=filled, other=0.0).to(
            tl.float32
        )
        total += slope * tl.load(y + place, mask=filled, other=0.0).to(tl.float32)
        tl.store(
            d_y + place, narrowed(tl.where(filled, slope * factor, 0.0), d_y.dtype.element_ty), mask=inside
        )
    tl.store(d_weight + row, narrowed(tl.sum(total, 1), d_weight.dtype.element_ty), mask=known)
