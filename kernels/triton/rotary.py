"""Rotary position embedding of queries and keys in one launch: what `kernels.rotary.rotate` computes of each.

PyTorch turns them by some ten kernels that read and write every number again and again, in fp32. Here each is read
and written once, in any dtype, cosines and sines once for all heads (and again for each sample, where samples share
them: from the cache). A turned tensor lies in memory as the given one does, [B, S, H, D] after a projection.

With x1 and x2 the halves of a row: y1 = x1 cos - x2 sin, y2 = x2 cos + x1 sin; backward, the same by -sin.

Shapes: B batch, H heads of queries, K of keys, S places, D head dimension; in kernels R places and G heads of a tile,
W = D / 2 rounded up to a power of two.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.rotary import Rotation
from headway.kernels.triton.map_tiles import Heads, wide
from headway.kernels.triton.numbers import narrowed
from headway.kernels.triton.tuning import Config, Space


def _configs(target: str, half: int) -> list[Config]:
    rows = max(1, 512 // half)
    return [Config({"R": rows, "G": 4}, 4, 1), Config({"R": max(1, rows // 2), "G": 4}, 2, 1)]


TURN = Space("rotary", _configs)


@torch.compiler.disable  # Triton compiles the kernel itself
def rotate(q: Tensor, k: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
    """Queries [B, H, S, D] and keys [B, K, S', D], feature pairs turned by each place's angles; dtypes are kept.

    Args:
        q, k: with any strides. If they have fewer places than `turn`, they are at the first of them.
        turn: of at least S and S' places; takes no gradient.

    Raises:
        ValueError: shapes do not fit.
    """
    shape = tuple(turn.cos.shape)
    for name, x in (("q", q), ("k", k)):
        if x.shape[-1] != 2 * shape[-1]:
            raise ValueError(f"{name} has head dimension {x.shape[-1]}; this turn is of {2 * shape[-1]}")
        if x.shape[2] > shape[-2]:
            raise ValueError(f"{name} has {x.shape[2]} places; this turn has {shape[-2]}")
        if len(shape) == 3 and shape[0] != x.shape[0]:
            raise ValueError(f"{name} has batch {x.shape[0]}; this turn is of {shape[0]}")
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]}, k {k.shape[0]}: they must be equal")
    turned: tuple[Tensor, Tensor] = _Rotate.apply(q, k, turn.cos.contiguous(), turn.sin.contiguous())
    return turned


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(q, k, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_q, d_k):
        cos, sin = ctx.saved_tensors
        return *_turned(d_q, d_k, cos, sin, back=True), None, None


def _turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, back: bool) -> tuple[Tensor, Tensor]:
    q, k = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k))
    turned = torch.empty_like(q), torch.empty_like(k)  # these keep the order of strides
    places, half = max(q.shape[2], k.shape[2]), cos.shape[-1]
    config = TURN.choose(q.device, half=triton.next_power_of_2(half))
    grid = (q.shape[0] * triton.cdiv(places, config.tiles["R"]),)
    tensors = (Heads(x, *x.stride()[:3]) for x in (q, k, *turned))
    counts = q.shape[1], k.shape[1], q.shape[2], k.shape[2], places
    batch = cos.stride(0) if cos.dim() == 3 else 0
    with torch.cuda.device_of(q):
        rotary_kernel[grid](
            *tensors,
            cos,
            sin,
            batch,
            *counts,
            half,
            BACK=back,
            W=triton.next_power_of_2(half),
            **config.options,
        )
    return turned


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def rotary_kernel(
    q,
    k,
    turned_q,
    turned_k,
    cos,
    sin,
    turn_batch,
    q_heads,
    k_heads,
    q_places,
    k_places,
    places,
    half,
    BACK: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    W: tl.constexpr,
):
    """A program: R places of a sample, all heads."""
    tiles = tl.cdiv(places, R)
    b = tl.program_id(0) // tiles
    place = tl.program_id(0) % tiles * R + tl.arange(0, R)
    column = tl.arange(0, W)
    inside = (place < places)[:, None] & (column < half)[None, :]
    at = wide(b) * turn_batch + wide(place)[:, None] * half + column[None, :]
    c = tl.load(cos + at, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(sin + at, mask=inside, other=0.0).to(tl.float32)
    if BACK:
        s = -s
    _turn(q, turned_q, c, s, b, place, column, q_heads, q_places, half, R, G)
    _turn(k, turned_k, c, s, b, place, column, k_heads, k_places, half, R, G)


@triton.jit
def _turn(x, y, c, s, b, place, column, heads, places, half, R: tl.constexpr, G: tl.constexpr):
    """All heads of x at some places, written to y; tiles are [R, G, W]."""
    known = (place < places)[:, None, None] & (column < half)[None, None, :]
    for first in range(0, heads, G):
        head = first + tl.arange(0, G)
        inside = known & (head < heads)[None, :, None]
        start = (
            x.data
            + wide(b) * x.batch
            + wide(head)[None, :, None] * x.head
            + wide(place)[:, None, None] * x.place
        )
        at = start + column[None, None, :]
        x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        x2 = tl.load(at + half, mask=inside, other=0.0).to(tl.float32)
        y1 = x1 * c[:, None, :] - x2 * s[:, None, :]
        y2 = x2 * c[:, None, :] + x1 * s[:, None, :]
        start = (
            y.data
            + wide(b) * y.batch
            + wide(head)[None, :, None] * y.head
            + wide(place)[:, None, None] * y.place
        )
        at = start + column[None, None, :]
        tl.store(at, narrowed(y1, y.data.dtype.element_ty), mask=inside)
        tl.store(at + half, narrowed(y2, y.data.dtype.element_ty), mask=inside)
