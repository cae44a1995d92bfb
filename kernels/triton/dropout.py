"""A bias, dropout and the residual sum in one pass over memory: residual + dropout(x + bias), what a block ends with.

PyTorch draws a mask of `kernels.random.keep` by some hundred kernels over int64, and keeps it for backward. Here an
element's sixteen bits are computed where they are needed, forward and again backward, and no mask is stored; the bits
are `keep`'s, so a step is the same at any layout and on any device.

Backward: d_x = dropout(dy) by the same mask, d_residual = dy, and the bias's gradient is the sum of d_x over rows, by
strips of rows whose sums are added in a fixed order. Coordinates are read by every program of a row's columns, the
bias by every tile of rows: from the cache.

Shapes: B batch, S places, E width, N = B S rows; in kernels R rows and C columns of a tile.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels import random
from headway.kernels.triton import philox
from headway.kernels.triton.map_tiles import wide
from headway.kernels.triton.numbers import narrowed
from headway.kernels.triton.strips import strips
from headway.kernels.triton.tuning import Config, Space


def _configs(target: str, width: int) -> list[Config]:
    columns = min(max(width, 8), 256)
    return [
        Config({"R": 2048 // columns, "C": columns}, 4, 1),
        Config({"R": 1024 // columns, "C": columns}, 2, 1),
    ]


FORWARD = Space("dropout_forward", _configs)
BACKWARD = Space("dropout_backward", _configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def dropout(
    x: Tensor,
    p: float,
    key: Tensor,
    coordinates: random.Coordinates,
    *,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """residual + dropout(x + bias), computed in fp32: what `kernels.dropout` computes.

    Args:
        x: [B, S, E].
        p: chance of being dropped, below 1; rounded to a multiple of 2^-16.
        key: int64, 0-dim, on x's device.
        coordinates: (slot [B, 1], position [1, S], 0), or other int64 tensors that broadcast to [B, S] and a number.
        bias: [E], of any dtype.
        residual: [B, S, E].

    Returns:
        [B, S, E] in the wider dtype of x and residual.

    Raises:
        ValueError: shapes, p or coordinates do not fit.
    """
    slot, position, third = coordinates
    if x.dim() != 3 or (residual is not None and residual.shape != x.shape):
        other = None if residual is None else list(residual.shape)
        raise ValueError(f"x is {list(x.shape)}, residual {other}: both must be [B, S, E]")
    if random.threshold(p) >= 65536:
        raise ValueError(f"p {p}: below 1, or nothing is kept")
    if not isinstance(position, Tensor) or isinstance(third, Tensor):
        raise ValueError("coordinates: two tensors and a number")
    slot, position = slot.expand(x.shape[:2]), position.expand(x.shape[:2])
    y: Tensor = _Dropout.apply(x, bias, residual, key, slot, position, third, p)
    return y


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, residual, key, slot, position, third, p):
        ctx.save_for_backward(key, slot, position)
        ctx.mask = third, random.threshold(p), random.kept_scale(p)
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, bias, residual))
        x = x.contiguous()
        added = None if residual is None else residual.contiguous()
        dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
        y = torch.empty_like(x, dtype=dtype)
        config = FORWARD.choose(x.device, width=triton.next_power_of_2(x.shape[-1]))
        grid = (triton.cdiv(slot.numel(), config.tiles["R"]) * triton.cdiv(x.shape[-1], config.tiles["C"]),)
        given = x, bias, added, y, key, slot, position
        with torch.cuda.device_of(x):
            dropout_forward_kernel[grid](*given, *_numbers(x, slot, position), *ctx.mask, **config.options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        key, slot, position = ctx.saved_tensors
        d_y = d_y.contiguous()
        kind, bias, residual = ctx.dtypes
        d_x = torch.empty_like(d_y, dtype=kind)
        rows, width = slot.numel(), d_y.shape[-1]
        config = BACKWARD.choose(d_y.device, width=triton.next_power_of_2(width))
        tiles = config.tiles
        count = triton.cdiv(rows, tiles["R"]) if bias is None else strips(rows, width, tiles["C"])
        parts = None if bias is None else d_y.new_empty(count, width, dtype=torch.float32)
        grid = (count * triton.cdiv(width, tiles["C"]),)
        given = d_y, d_x, parts, key, slot, position
        with torch.cuda.device_of(d_y):
            dropout_backward_kernel[grid](*given, *_numbers(d_y, slot, position), *ctx.mask, **config.options)
        d_bias = None if parts is None else parts.sum(0).to(bias)
        return d_x, d_bias, None if residual is None else d_y.to(residual), *[None] * 5


def _numbers(x: Tensor, slot: Tensor, position: Tensor) -> tuple[int, ...]:
    return slot.numel(), x.shape[1], x.shape[2], *slot.stride(), *position.stride()


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def dropout_forward_kernel(
    x,
    bias,
    residual,
    y,
    key,
    slot,
    position,
    rows,
    places,
    width,
    slot_batch,
    slot_place,
    position_batch,
    position_place,
    third,
    least,
    scale,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program: R rows and C columns."""
    blocks = tl.cdiv(width, C)
    row = tl.program_id(0) // blocks * R + tl.arange(0, R)
    first = tl.program_id(0) % blocks * C
    column = first + tl.arange(0, C)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = wide(row)[:, None] * width + column[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    a = _coordinate(slot, row, rows, places, slot_batch, slot_place)
    b = _coordinate(position, row, rows, places, position_batch, position_place)
    value = tl.where(philox.keep(tl.load(key), least, a, b, wide(third), first, R, C), value * scale, 0.0)
    if residual is not None:
        value += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + place, narrowed(value, y.dtype.element_ty), mask=inside)


@triton.jit
def dropout_backward_kernel(
    d_y,
    d_x,
    d_bias,
    key,
    slot,
    position,
    rows,
    places,
    width,
    slot_batch,
    slot_place,
    position_batch,
    position_place,
    third,
    least,
    scale,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program: C columns, every so many-th tile of R rows, and its share of the sums over rows."""
    blocks = tl.cdiv(width, C)
    strip = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * C
    column = first + tl.arange(0, C)
    there = column < width
    total = tl.zeros([C], tl.float32)
    random_key = tl.load(key)
    for start in range(strip * R, rows, tl.num_programs(0) // blocks * R):
        row = start + tl.arange(0, R)
        inside = (row < rows)[:, None] & there[None, :]
        place = wide(row)[:, None] * width + column[None, :]
        slope = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
        a = _coordinate(slot, row, rows, places, slot_batch, slot_place)
        b = _coordinate(position, row, rows, places, position_batch, position_place)
        slope = tl.where(philox.keep(random_key, least, a, b, wide(third), first, R, C), slope * scale, 0.0)
        tl.store(d_x + place, narrowed(slope, d_x.dtype.element_ty), mask=inside)
        total += tl.sum(slope, 0)
    if d_bias is not None:
        tl.store(d_bias + strip * width + column, total, mask=there)


@triton.jit
def _coordinate(words, row, rows, places, batch, place):
    """A word of rows' coordinates, from a tensor [B, S], int64."""
    at = wide(row // places) * batch + wide(row % places) * place
    return tl.load(words + at, mask=row < rows, other=0)
