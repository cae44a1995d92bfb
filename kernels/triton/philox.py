"""Philox4x32-10 in kernels: dropout's mask, bit for bit that of `kernels.random.keep`, hence equal at any layout.

Shapes: M rows of a tile, N columns.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels import philox_host

_M0, _M1 = (tl.constexpr(x) for x in philox_host.MULTIPLIERS)
_W0, _W1 = (tl.constexpr(x) for x in philox_host.INCREMENTS)


@triton.jit
def words(key, c0, c1, c2, c3):
    """Four words (uint32) of a key (int64, a scalar) and a counter of four words: uint32, c0 of the words' shape."""
    k0 = (key & 0xFFFFFFFF).to(tl.uint32)
    k1 = ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = c0 ^ c0
    c1, c2, c3 = c1 + zero, c2 + zero, c3 + zero
    m0, m1 = tl.full([], _M0, tl.uint32), tl.full([], _M1, tl.uint32)
    w0, w1 = tl.full([], _W0, tl.uint32), tl.full([], _W1, tl.uint32)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, m0 + zero), c0 * m0
        high1, low1 = tl.umulhi(c2, m1 + zero), c2 * m1
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 += w0
        k1 += w1
    return c0, c1, c2, c3


@triton.jit
def keep(key, least, a, b, c, first, M: tl.constexpr, N: tl.constexpr):
    """Which elements of columns [first, first + N) are kept, [M, N].

    `a`, `b`, `c`: coordinates of rows, [M] or scalars; `first` and N: multiples of 8; `least`: `random.threshold(p)`.
    One Philox call serves eight elements.
    """
    group = (first // 8 + tl.arange(0, N // 8)).to(tl.uint32)[None, :] + tl.zeros([M, N // 8], tl.uint32)
    row = tl.zeros([M], tl.uint32)
    a, b, c = row + a.to(tl.uint32), row + b.to(tl.uint32), row + c.to(tl.uint32)
    w0, w1, w2, w3 = words(key, group, c[:, None], b[:, None], a[:, None])
    pairs = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # [M, N / 8, place in a pair, pair]
    four = tl.reshape(tl.permute(pairs, (0, 1, 3, 2)), (M, N // 2))
    halves = tl.join(four & 0xFFFF, four >> 16)  # of a word the low half comes first
    return tl.reshape(halves, (M, N)) >= least
