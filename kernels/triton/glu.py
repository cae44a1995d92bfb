"""Activations of feed-forward layers, gated and plain, with biases: what `kernels.glu` computes after the products.

PyTorch adds biases, activates and multiplies by kernels of their own, each a pass over [N, F], and keeps what they
gave for backward. Here what the products gave is read once, and once again backward, where the activation is computed
anew; sums are of fp32. Biases are read by every tile of rows: from the cache. Where nothing else but a plain
activation is computed, compiled PyTorch is as good.

With g = gate + its bias and u = up + its bias: y = f(g) u; backward d_g = dy u f'(g), d_u = dy f(g), and gradients
of biases are their sums over rows, by strips of rows whose sums are added in a fixed order. A plain activation is
y = f(g).

Shapes: N rows, F width; in kernels R rows and C columns of a tile.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.glu import GATED, PLAIN
from headway.kernels.triton.activations import GATES, activated
from headway.kernels.triton.numbers import narrowed
from headway.kernels.triton.strips import strips
from headway.kernels.triton.targets import TARGETS
from headway.kernels.triton.tuning import Config, Space


def _forward_configs(target: str, width: int) -> list[Config]:
    columns = min(width, 512)
    return [
        Config({"R": 2048 // columns, "C": columns}, 4, 1),
        Config({"R": 4096 // columns, "C": columns}, 8, 1),
    ]


def _backward_configs(target: str, width: int) -> list[Config]:
    columns = min(width, 256)
    # A thread has as much as it loads at once, 16 bytes of each operand: with twice that, registers run out.
    tiles = [(8 * TARGETS[target].lanes * warps, warps) for warps in (4, 2)]
    return [Config({"R": max(1, size // columns), "C": columns}, warps, 1) for size, warps in tiles]


FORWARD = Space("glu_forward", _forward_configs)
BACKWARD = Space("glu_backward", _backward_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def glu(
    gate: Tensor,
    up: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
) -> Tensor:
    """activation(gate + gate_bias, up + up_bias), [..., F] in the dtype of gate.

    Args:
        gate, up: [..., F], parts of one tensor maybe.
        activation: of `kernels.glu.GATED`.
        gate_bias, up_bias: [F], of any dtype.

    Raises:
        ValueError: the activation is unknown, or shapes do not fit.
    """
    if activation not in GATES:
        raise ValueError(f"activation {activation!r}: one of {', '.join(GATED)}")
    if gate.shape != up.shape:
        raise ValueError(f"up has shape {tuple(up.shape)}, gate {tuple(gate.shape)}: they must be equal")
    y: Tensor = _Activate.apply(gate, up, gate_bias, up_bias, GATES[activation])
    return y


@torch.compiler.disable  # as above
def activate(x: Tensor, activation: str, bias: Tensor | None = None) -> Tensor:
    """activation(x + bias), [..., F] in the dtype of x.

    Args:
        activation: of `kernels.glu.PLAIN`.
        bias: [F], of any dtype.

    Raises:
        ValueError: the activation is unknown.
    """
    if activation not in PLAIN:
        raise ValueError(f"activation {activation!r}: one of {', '.join(PLAIN)}")
    y: Tensor = _Activate.apply(x, None, bias, None, activation)
    return y


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, gate_bias, up_bias, name):
        ctx.save_for_backward(gate, up, gate_bias, up_bias)
        ctx.name = name
        gate_NF, up_NF = _rows(gate), None if up is None else _rows(up)
        rows, width = gate_NF.shape
        y = torch.empty_like(gate, memory_format=torch.contiguous_format)
        config = FORWARD.choose(gate.device, width=triton.next_power_of_2(width))
        grid = (triton.cdiv(rows, config.tiles["R"]) * triton.cdiv(width, config.tiles["C"]),)
        given = gate_NF, up_NF, gate_bias, up_bias, y, rows, width, *_steps(gate_NF, up_NF)
        with torch.cuda.device_of(gate):
            glu_forward_kernel[grid](*given, NAME=name, **config.options)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):
        gate, up, gate_bias, up_bias = ctx.saved_tensors
        gate_NF, up_NF = _rows(gate), None if up is None else _rows(up)
        rows, width = gate_NF.shape
        d_gate = torch.empty_like(gate, memory_format=torch.contiguous_format)
        d_up = None if up is None else torch.empty_like(up, memory_format=torch.contiguous_format)
        config = BACKWARD.choose(gate.device, width=triton.next_power_of_2(width))
        biases = gate_bias, up_bias
        summed = any(bias is not None for bias in biases)
        tiles = config.tiles
        count = strips(rows, width, tiles["C"]) if summed else triton.cdiv(rows, tiles["R"])
        parts = [None if b is None else gate.new_empty(count, width, dtype=torch.float32) for b in biases]
        given = d_y.contiguous(), gate_NF, up_NF, *biases, d_gate, d_up, *parts
        grid = (count * triton.cdiv(width, tiles["C"]),)
        with torch.cuda.device_of(gate):
            glu_backward_kernel[grid](
                *given, rows, width, *_steps(gate_NF, up_NF), NAME=ctx.name, **config.options
            )
        sums = (
            None if part is None else part.sum(0).to(b.dtype) for part, b in zip(parts, biases, strict=True)
        )
        return d_gate, d_up, *sums, None


def _rows(x: Tensor) -> Tensor:
    """[N, F], a view wherever rows lie evenly apart: parts of a wider product are not copied."""
    return x.reshape(-1, x.shape[-1]) if x.stride(-1) == 1 else x.contiguous().view(-1, x.shape[-1])


def _steps(gate_NF: Tensor, up_NF: Tensor | None) -> tuple[int, int]:
    return gate_NF.stride(0), 0 if up_NF is None else up_NF.stride(0)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def glu_forward_kernel(
    gate,
    up,
    gate_bias,
    up_bias,
    y,
    rows,
    width,
    gate_step,
    up_step,
    NAME: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program: R rows and C columns."""
    blocks = tl.cdiv(width, C)
    row = tl.program_id(0) // blocks * R + tl.arange(0, R)
    column = tl.program_id(0) % blocks * C + tl.arange(0, C)
    g = _biased(gate, _bias(gate_bias, column, width, C), row, column, rows, width, gate_step)
    value, _ = activated(g, NAME)
    if up is not None:
        value *= _biased(up, _bias(up_bias, column, width, C), row, column, rows, width, up_step)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    tl.store(y + place, narrowed(value, y.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward_kernel(
    d_y,
    gate,
    up,
    gate_bias,
    up_bias,
    d_gate,
    d_up,
    d_gate_bias,
    d_up_bias,
    rows,
    width,
    gate_step,
    up_step,
    NAME: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
):
    """A program: C columns, every so many-th tile of R rows, and its share of the sums over rows."""
    blocks = tl.cdiv(width, C)
    strip = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * C + tl.arange(0, C)
    there = column < width
    shift_g = _bias(gate_bias, column, width, C)
    shift_u = _bias(up_bias, column, width, C)
    sum_g = tl.zeros([C], tl.float32)
    sum_u = tl.zeros([C], tl.float32)
    for first in range(strip * R, rows, tl.num_programs(0) // blocks * R):
        row = first + tl.arange(0, R)
        inside = (row < rows)[:, None] & there[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        slope = tl.load(d_y + place, mask=inside, other=0.0).to(tl.float32)
        value, rise = activated(_biased(gate, shift_g, row, column, rows, width, gate_step), NAME)
        d_g = slope * rise
        if up is not None:
            d_u = slope * value
            d_g *= _biased(up, shift_u, row, column, rows, width, up_step)
            tl.store(d_up + place, narrowed(d_u, d_up.dtype.element_ty), mask=inside)
            sum_u += tl.sum(d_u, 0)
        tl.store(d_gate + place, narrowed(d_g, d_gate.dtype.element_ty), mask=inside)
        sum_g += tl.sum(d_g, 0)
    part = strip * width + column
    if d_gate_bias is not None:
        tl.store(d_gate_bias + part, sum_g, mask=there)
    if d_up_bias is not None:
        tl.store(d_up_bias + part, sum_u, mask=there)


@triton.jit
def _bias(bias, column, width, C: tl.constexpr):
    """Some columns of a bias, zeros where there is none, [C] fp32."""
    if bias is not None:
        return tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    else:
        return tl.zeros([C], tl.float32)


@triton.jit
def _biased(x, shift, row, column, rows, width, step):
    """A tile of x plus its bias, fp32; outside, the bias alone: a gradient that is not loaded is 0 there."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    place = row.to(tl.int64)[:, None] * step + column[None, :]
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32) + shift[None, :]
