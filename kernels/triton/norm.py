"""LayerNorm and RMSNorm in one pass over memory, with the residual sum before them: what `kernels.norm` computes.

PyTorch's LayerNorm is fused, but reads the sum again that another kernel has just written, and writes its fp32 result
for a third to narrow. Here a row is read once, in any dtype; the sum and the normed row are written once.

With u = x + residual, m the mean of u (0 for RMSNorm), r = 1 / sqrt(mean((u - m)^2) + eps) and n = (u - m) r:
y = n weight + bias. Backward, with g = dy weight: du = r (g - mean(g) - n mean(g n)), of RMSNorm without mean(g), plus
what flows to the sum; dweight = sum dy n, dbias = sum dy over rows, by strips of rows whose sums are added in a fixed
order.

Shapes: N rows, E width; in kernels R rows of a tile, W = E rounded up to a power of two.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.norm import WIDEST
from headway.kernels.triton.numbers import narrowed
from headway.kernels.triton.targets import TARGETS
from headway.kernels.triton.tuning import Config, Space

STRIPS = 256
"""Programs of a backward, each with a strip of rows; the same on every GPU, so that sums are."""


def _configs(target: str, width: int) -> list[Config]:
    """Tiles of 2,048 numbers or a row; every thread has one load of 16 bytes of bf16, or two."""
    rows = max(1, 2048 // width)
    warps = max(1, rows * width // (8 * TARGETS[target].lanes))
    return [Config({"R": rows}, min(warps, 16) // few, 1) for few in (1, 2) if warps >= few]


FORWARD = Space("norm_forward", _configs)
BACKWARD = Space("norm_backward", _configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float,
    centred: bool,
    residual: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of x + residual over the last dim, and that sum; [..., E] both.

    Args:
        weight, bias: [E]; a bias if `centred` alone.
        eps: beside the mean square.
        centred: LayerNorm, else RMSNorm.
        residual: of x's shape; without it the sum is x itself.
        dtype: of the norm; x's if not given. The sum has x's dtype.

    Raises:
        ValueError: E is above WIDEST.
    """
    if x.shape[-1] > WIDEST:
        raise ValueError(f"width {x.shape[-1]}: a row of at most {WIDEST} numbers fits into a program")
    y, total = _Norm.apply(x, residual, weight, bias, eps, centred, dtype or x.dtype)
    return y, x if total is None else total


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, centred, dtype):
        x_NE = x.contiguous().view(-1, x.shape[-1])
        rows, width = x_NE.shape
        y = torch.empty_like(x_NE, dtype=dtype)
        added = None if residual is None else residual.contiguous().view_as(x_NE)
        total = x_NE if residual is None else torch.empty_like(x_NE)
        inverse = x_NE.new_empty(rows, dtype=torch.float32)
        mean = torch.empty_like(inverse) if centred else None
        padded = triton.next_power_of_2(width)
        config = FORWARD.choose(x.device, width=padded)
        grid = (triton.cdiv(rows, config.tiles["R"]),)
        given = x_NE, added, weight, bias, y, total, mean, inverse, rows, width, eps
        with torch.cuda.device_of(x):
            norm_forward_kernel[grid](*given, W=padded, **config.options)
        ctx.save_for_backward(total, weight, bias, mean, inverse)
        ctx.had_residual = residual is not None
        ctx.set_materialize_grads(False)
        return y.view(x.shape), None if residual is None else total.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y, d_total):
        total, weight, bias, mean, inverse = ctx.saved_tensors
        rows, width = total.shape
        d_x = torch.empty_like(total)
        parts = total.new_empty(2 if bias is not None else 1, STRIPS, width, dtype=torch.float32)
        d_weight, d_bias = parts[0], parts[1] if bias is not None else None
        padded = triton.next_power_of_2(width)
        config = BACKWARD.choose(total.device, width=padded)
        d_y, d_total = (None if d is None else d.contiguous() for d in (d_y, d_total))
        given = d_y, d_total, total, weight, mean, inverse, d_x, d_weight, d_bias, rows, width
        with torch.cuda.device_of(total):
            norm_backward_kernel[STRIPS,](*given, W=padded, **config.options)
        sums = parts.sum(1).to(weight.dtype)
        d_x = d_x.view(d_y.shape)
        return (
            d_x,
            d_x if ctx.had_residual else None,
            sums[0],
            sums[1] if bias is not None else None,
            *[None] * 3,
        )


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def norm_forward_kernel(
    x, residual, weight, bias, y, total, mean, inverse, rows, width, eps, R: tl.constexpr, W: tl.constexpr
):
    """A program: R rows. Without `residual`, `total` is x and is not written; without `mean`, RMSNorm."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.arange(0, W)
    there = column < width
    inside = (row < rows)[:, None] & there[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    u = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        like = total.dtype.element_ty
        u += tl.load(residual + place, mask=inside, other=0.0).to(tl.float32)
        kept = narrowed(u, like)
        tl.store(total + place, kept, mask=inside)
        u = kept.to(tl.float32)  # of what the backward will read
    if mean is not None:
        m = tl.sum(u, 1) / width
        tl.store(mean + row, m, mask=row < rows)
        u = tl.where(inside, u - m[:, None], 0.0)
    r = 1 / tl.sqrt(tl.sum(u * u, 1) / width + eps)
    tl.store(inverse + row, r, mask=row < rows)
    n = u * r[:, None] * tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        n += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[None, :]
    tl.store(y + place, narrowed(n, y.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    d_y,
    d_total,
    total,
    weight,
    mean,
    inverse,
    d_x,
    d_weight,
    d_bias,
    rows,
    width,
    R: tl.constexpr,
    W: tl.constexpr,
):
    """A program: every so many-th tile of R rows, and its share of the sums over rows."""
    column = tl.arange(0, W)
    there = column < width
    scale = tl.load(weight + column, mask=there, other=0.0).to(tl.float32)[None, :]
    d_scale = tl.zeros([W], tl.float32)
    d_shift = tl.zeros([W], tl.float32)
    for first in range(tl.program_id(0) * R, rows, tl.num_programs(0) * R):
        row = first + tl.arange(0, R)
        known = row < rows
        inside = known[:, None] & there[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        n = tl.load(total + place, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(inverse + row, mask=known, other=0.0)
        if mean is not None:
            n = tl.where(inside, n - tl.load(mean + row, mask=known, other=0.0)[:, None], 0.0)
        n *= r[:, None]
        slope = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
        d_scale += tl.sum(slope * n, 0)
        d_shift += tl.sum(slope, 0)
        slope *= scale
        d_u = slope - n * (tl.sum(slope * n, 1) / width)[:, None]
        if mean is not None:
            d_u -= (tl.sum(slope, 1) / width)[:, None]
        d_u *= r[:, None]
        if d_total is not None:
            d_u += tl.load(d_total + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_x + place, narrowed(d_u, d_x.dtype.element_ty), mask=inside)
    strip = tl.program_id(0) * width + column
    tl.store(d_weight + strip, d_scale, mask=there)
    if d_bias is not None:
        tl.store(d_bias + strip, d_shift, mask=there)
