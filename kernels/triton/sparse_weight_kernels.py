"""Triton kernels of sparsemax and 1.5-entmax attention, forward and backward, in O(S) memory.

With z = scale q k^T of the keys that are seen (of 1.5-entmax half of it), a row's weights are w = max(z - tau, 0)^POWER
with tau such that they sum to 1, POWER 1 or 2 (Martins and Astudillo 2016; Peters et al. 2019). A score's gradient is
g (dw - delta), g = w^(1 - 1/POWER) (of sparsemax 1 on the support) and delta = sum g dw / sum g, dw = do v^T.

Softmax's running sums can be rescaled when a larger score comes; a threshold cannot, for it says which keys count. So
the forward goes over the keys, computing their scores anew, once for the largest score, PASSES times for tau, and once
for the output; the queries' gradient goes over them once for delta and once more; keys' gradients go over the queries
once, or of heads wider than 128 once each, for want of registers (see `sparse_configs`). For it, too, the backward of
heads wider than 64 in fp32 loads a program's own rows for every tile again, C columns at once, and what it multiplies
twice, twice. Kept is tau, and delta: two numbers a row.

A pass has tau in [low, high], at first [max - 1, max], and sums at `low` and at the middle. The sum is convex and
falls, so Newton's step from a place below the root stays below: from the middle where that is below, else from `low`.
So the bracket halves at least, what is left after n passes is at most 2^-n, and the steps converge quadratically.

Shapes, `rows` and `cols`: see `map_tiles`; scores are [M, N], in the keys' kernel [N, M].
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.triton.attention_tiles import kept_anew
from headway.kernels.triton.map_tiles import (
    aligned,
    held,
    key_range,
    place_of,
    product,
    put,
    put_row,
    query_range,
    row,
    sees,
    tile,
)
from headway.kernels.triton.numbers import as_operand, narrowed, operand


@triton.jit
def seen_scores(products, scale, seen, b, rows, cols, sizes, CAUSAL: tl.constexpr):
    """z of a tile, -inf where a key is not seen."""
    z = products * scale
    return tl.where(sees(seen, b, rows, cols, sizes, CAUSAL), z, float("-inf"))


@triton.jit
def weighed(z, tau, POWER: tl.constexpr):
    """w and g of scores; `tau` broadcasts."""
    above = tl.maximum(z - tau, 0.0)
    if POWER == 1:
        w = above
        g = tl.where(above > 0, 1.0, 0.0)
    else:
        w = above * above
        g = above
    return w, g


@triton.jit
def stepped(low, value, slope, POWER: tl.constexpr):
    """Newton's step from `low`, where w sum to `value` and g to `slope`; where no key is above, none."""
    some = slope > 0
    return tl.where(some, low + (value - 1) / tl.where(some, POWER * slope, 1.0), low)


@triton.jit
def sparse_weights_forward_kernel(
    q, k, v, out, taus, seen, drop, sizes, scale, group,
    POWER: tl.constexpr, PASSES: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program: M queries of a head. Rows that see nothing give 0, and a tau of +inf."""
    q, k, v, out = aligned(q, BY), aligned(k, BY), aligned(v, BY), aligned(out, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows, cols = first + tl.arange(0, M), tl.arange(0, N)
    left = operand(tile(q, b, h, first, sizes.queries, M, D, W))
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    high = tl.full([M], float("-inf"), tl.float32)
    for key in range(start, stop, N):
        right = operand(tile(k, b, h // group, key, sizes.keys, N, D, W))
        z = tl.dot(left, tl.trans(right), input_precision="ieee")
        z = seen_scores(z, scale, seen, b, rows[:, None], key + cols[None, :], sizes, CAUSAL)
        high = tl.maximum(high, tl.max(z, 1))
    high = tl.where(high == float("-inf"), float("inf"), high)
    low = high - 1
    for _ in range(PASSES):
        middle = 0.5 * (low + high)
        low_value, low_slope = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        value, slope = tl.zeros([M], tl.float32), tl.zeros([M], tl.float32)
        for key in range(start, stop, N):
            right = operand(tile(k, b, h // group, key, sizes.keys, N, D, W))
            z = tl.dot(left, tl.trans(right), input_precision="ieee")
            z = seen_scores(z, scale, seen, b, rows[:, None], key + cols[None, :], sizes, CAUSAL)
            w, g = weighed(z, low[:, None], POWER)
            low_value += tl.sum(w, 1)
            low_slope += tl.sum(g, 1)
            w, g = weighed(z, middle[:, None], POWER)
            value += tl.sum(w, 1)
            slope += tl.sum(g, 1)
        below = value >= 1
        low = tl.where(below, stepped(middle, value, slope, POWER), stepped(low, low_value, low_slope, POWER))
        high = tl.where(below, high, middle)
        low = tl.minimum(low, high)
    sums = tl.zeros([M, W], tl.float32)
    for key in range(start, stop, N):
        right = operand(tile(k, b, h // group, key, sizes.keys, N, D, W))
        z = tl.dot(left, tl.trans(right), input_precision="ieee")
        z = seen_scores(z, scale, seen, b, rows[:, None], key + cols[None, :], sizes, CAUSAL)
        w, g = weighed(z, low[:, None], POWER)
        if drop is not None:
            w = tl.where(kept_anew(drop, b, h, first, key, sizes, M, N), w * drop.factor, 0.0)
        value_tile = operand(tile(v, b, h // group, key, sizes.keys, N, D, W))
        sums += tl.dot(as_operand(w, v.data.dtype.element_ty), value_tile, input_precision="ieee")
    put_row(taus, b, sizes.heads, h, rows, sizes, low)
    put(out, b, h, first, sizes.queries, narrowed(sums, out.data.dtype.element_ty), M, D, W)


@triton.jit
def weight_gradient(
    slope, d_out, v, drop, b, h, group, first, key, sizes,
    D: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """dw of a tile, [M, N]; `slope`: of `d_out`, see `held`."""
    value = held(v, b, h // group, key, sizes.keys, N, D, W, C)
    d_w = product(slope, value, d_out, h, first, sizes.queries, v, h // group, key, sizes.keys, b, M, N, D, C)
    if drop is not None:
        d_w = tl.where(kept_anew(drop, b, h, first, key, sizes, M, N), d_w * drop.factor, 0.0)
    return d_w


@triton.jit
def sparse_weights_query_kernel(
    q, k, v, taus, d_out, delta, d_q, seen, drop, sizes, scale, group,
    POWER: tl.constexpr, CAUSAL: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: M queries of a head, their gradient, and delta [B, H, Q], which the keys' kernel reads."""
    q, k, v = aligned(q, BY), aligned(k, BY), aligned(v, BY)
    d_out, d_q = aligned(d_out, BY), aligned(d_q, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows, cols = first + tl.arange(0, M), tl.arange(0, N)
    left = held(q, b, h, first, sizes.queries, M, D, W, C)
    slope = held(d_out, b, h, first, sizes.queries, M, D, W, C)
    tau = row(taus, b, sizes.heads, h, rows, sizes)[:, None]
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    total = tl.zeros([M], tl.float32)
    mean = tl.zeros([M], tl.float32)
    for key in range(start, stop, N):
        right = held(k, b, h // group, key, sizes.keys, N, D, W, C)
        z = product(left, right, q, h, first, sizes.queries, k, h // group, key, sizes.keys, b, M, N, D, C)
        z = seen_scores(z, scale, seen, b, rows[:, None], key + cols[None, :], sizes, CAUSAL)
        _, g = weighed(z, tau, POWER)
        d_w = weight_gradient(slope, d_out, v, drop, b, h, group, first, key, sizes, D, W, M, N, C)
        total += tl.sum(g, 1)
        mean += tl.sum(g * d_w, 1)
    mean = mean / tl.where(total > 0, total, 1.0)
    put_row(delta, b, sizes.heads, h, rows, sizes, mean)
    sums = tl.zeros([M, W], tl.float32)
    for key in range(start, stop, N):
        right = held(k, b, h // group, key, sizes.keys, N, D, W, C)
        z = product(left, right, q, h, first, sizes.queries, k, h // group, key, sizes.keys, b, M, N, D, C)
        z = seen_scores(z, scale, seen, b, rows[:, None], key + cols[None, :], sizes, CAUSAL)
        _, g = weighed(z, tau, POWER)
        d_w = weight_gradient(slope, d_out, v, drop, b, h, group, first, key, sizes, D, W, M, N, C)
        d_s = g * (d_w - mean[:, None])
        if C < W:
            right = operand(tile(k, b, h // group, key, sizes.keys, N, D, W))
        sums += tl.dot(as_operand(d_s, k.data.dtype.element_ty), right, input_precision="ieee")
    sums *= scale * POWER
    put(d_q, b, h, first, sizes.queries, narrowed(sums, d_q.data.dtype.element_ty), M, D, W)


@triton.jit
def sparse_weights_key_kernel(
    q, k, v, taus, d_out, delta, d_k, d_v, seen, drop, sizes, scale, group,
    POWER: tl.constexpr, CAUSAL: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: N keys of a key head, and all query heads that read it; gradients of keys, of values, or of both."""
    q, k, v = aligned(q, BY), aligned(k, BY), aligned(v, BY)
    d_out, d_k, d_v = aligned(d_out, BY), aligned(d_k, BY), aligned(d_v, BY)
    b, head, first = place_of(sizes.heads // group, sizes.keys, N)
    rows, cols = tl.arange(0, M), first + tl.arange(0, N)
    left = held(k, b, head, first, sizes.keys, N, D, W, C)
    if OF_KEYS:
        value = held(v, b, head, first, sizes.keys, N, D, W, C)
    like = q.data.dtype.element_ty
    start, stop = query_range(seen, b, first, sizes, CAUSAL, M, N)
    d_keys = tl.zeros([N, W], tl.float32)
    d_values = tl.zeros([N, W], tl.float32)
    for h in range(head * group, (head + 1) * group):
        for query in range(start, stop, M):
            right = held(q, b, h, query, sizes.queries, M, D, W, C)
            z = product(left, right, k, head, first, sizes.keys, q, h, query, sizes.queries, b, N, M, D, C)
            z = seen_scores(z, scale, seen, b, query + rows[None, :], cols[:, None], sizes, CAUSAL)
            w, g = weighed(z, row(taus, b, sizes.heads, h, query + rows, sizes)[None, :], POWER)
            slope = held(d_out, b, h, query, sizes.queries, M, D, W, C)
            if drop is not None:
                stays = tl.trans(kept_anew(drop, b, h, query, first, sizes, M, N))
            if OF_VALUES:
                if drop is not None:
                    w = tl.where(stays, w, 0.0)
                if C < W:
                    slope = operand(tile(d_out, b, h, query, sizes.queries, M, D, W))
                d_values += tl.dot(as_operand(w, like), slope, input_precision="ieee")
            if OF_KEYS:
                d_w = product(
                    value, slope, v, head, first, sizes.keys, d_out, h, query, sizes.queries, b, N, M, D, C
                )
                if drop is not None:
                    d_w = tl.where(stays, d_w * drop.factor, 0.0)
                d_s = g * (d_w - row(delta, b, sizes.heads, h, query + rows, sizes)[None, :])
                if C < W:
                    right = operand(tile(q, b, h, query, sizes.queries, M, D, W))
                d_keys += tl.dot(as_operand(d_s, like), right, input_precision="ieee")
    if OF_KEYS:
        d_keys *= scale * POWER
        put(d_k, b, head, first, sizes.keys, narrowed(d_keys, d_k.data.dtype.element_ty), N, D, W)
    if OF_VALUES:
        if drop is not None:
            d_values *= drop.factor
        put(d_v, b, head, first, sizes.keys, narrowed(d_values, d_v.data.dtype.element_ty), N, D, W)
