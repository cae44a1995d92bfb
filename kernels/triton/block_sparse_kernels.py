"""Triton kernels of softmax attention over the tiles that a scope leaves, forward and backward.

With scores s = scale q k^T of the pairs that are seen, o = softmax(s) v. The forward walks through a block of queries'
tiles with a running maximum and sum (Milakov and Gimelshein 2018) and keeps log-sum-exps; the backward computes weights
p = e^(s - lse) again (Dao et al. 2022, algorithm 4): with dp = do v^T and delta = sum do o of a row,
ds = p (dp - delta), dq = scale ds k, dk = scale ds^T q, dv = p^T do. Powers are of two, so log-sum-exps are binary.

A program owns a block of queries, or of keys, and what it writes. The forward reads every key and value as often as
blocks of queries see its tile, and so do the others with what they walk through: the least that tiles allow, since the
walker's own block stays where it is. Gradients of keys and values wider than 128 are summed by a launch each, for want
of registers; and in fp32 the backward of heads wider than 64 loads the walker's own block for every tile again, C
columns at once, and what it multiplies twice, twice: see `sparse_configs`.

Shapes, `rows` and `cols`: see `map_tiles`; scores are [M, N], in the keys' kernel [N, M].
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.triton.attention_tiles import kept_anew
from headway.kernels.triton.map_tiles import aligned, held, product, put, put_row, row, tile
from headway.kernels.triton.numbers import as_operand, narrowed, operand

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def block_of(tiles, sizes, heads):
    """Sample, head and block of this program: one block of all heads, then the next in order."""
    program = tl.program_id(0)
    sample_heads = sizes.batch * heads
    sample_head = program % sample_heads
    return sample_head // heads, sample_head % heads, tl.load(tiles.order + program // sample_heads)


@triton.jit
def run(tiles, block, PARTIAL: tl.constexpr):
    """From where to where the block's tiles are, of those that are seen wholly or in part."""
    if PARTIAL:
        starts = tiles.partial_starts + block
    else:
        starts = tiles.full_starts + block
    return tl.load(starts), tl.load(starts + 1)


@triton.jit
def other(tiles, at, PARTIAL: tl.constexpr):
    """The block on the other side of a tile."""
    if PARTIAL:
        found = tl.load(tiles.partial + at)
    else:
        found = tl.load(tiles.full + at)
    return found


@triton.jit
def masked(
    s, tiles, at, documents, b, first, first_key, rows, cols, sizes, M: tl.constexpr, PARTIAL: tl.constexpr
):
    """Scores, -inf where a pair is not seen; `rows` and `cols` count from the tile's own first ones."""
    if PARTIAL:
        seen = tl.load(tiles.bits + tl.load(tiles.patterns + at).to(tl.int64) * M + rows)
        s = tl.where(((seen >> cols.to(tl.int64)) & 1) != 0, s, float("-inf"))
    if documents is not None:
        start = documents + b * sizes.queries
        own = tl.load(start + first + rows, mask=first + rows < sizes.queries, other=-1)
        theirs = tl.load(start + first_key + cols, mask=first_key + cols < sizes.queries, other=-1)
        s = tl.where(own == theirs, s, float("-inf"))
    return s


@triton.jit
def block_sparse_forward_kernel(
    q, k, v, out, lse, tiles, documents, drop, sizes, scale, group,
    D: tl.constexpr, W: tl.constexpr, BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program: M queries of a head. Rows that see nothing give 0, and log-sum-exps of +inf."""
    q, k, v, out = aligned(q, BY), aligned(k, BY), aligned(v, BY), aligned(out, BY)
    b, h, block = block_of(tiles, sizes, sizes.heads)
    first = block * M
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    left = operand(tile(q, b, h, first, sizes.queries, M, D, W))
    top = tl.full([M], float("-inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    sums = tl.zeros([M, W], tl.float32)
    for PARTIAL in tl.static_range(2):
        start, stop = run(tiles, block, PARTIAL)
        for at in range(start, stop):
            key = other(tiles, at, PARTIAL) * N
            right = operand(tile(k, b, h // group, key, sizes.queries, N, D, W))
            s = tl.dot(left, tl.trans(right), input_precision="ieee") * (scale * LOG2_E)
            s = masked(
                s, tiles, at, documents, b, first, key, rows[:, None], cols[None, :], sizes, M, PARTIAL
            )
            higher = tl.maximum(top, tl.max(s, 1))
            base = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            if drop is not None:
                p = tl.where(kept_anew(drop, b, h, first, key, sizes, M, N), p, 0.0)
            value = operand(tile(v, b, h // group, key, sizes.queries, N, D, W))
            p = as_operand(p, v.data.dtype.element_ty)
            sums = sums * shrink[:, None] + tl.dot(p, value, input_precision="ieee")
            top = higher
    some = total > 0
    total = tl.where(some, total, 1.0)
    put_row(lse, b, sizes.heads, h, first + rows, sizes, tl.where(some, top + tl.log2(total), float("inf")))
    share = 1 / total
    if drop is not None:
        share = drop.factor / total
    sums *= share[:, None]
    put(out, b, h, first, sizes.queries, narrowed(sums, out.data.dtype.element_ty), M, D, W)


@triton.jit
def block_sparse_query_kernel(
    q, k, v, out, lse, d_out, delta, d_q, tiles, documents, drop, sizes, scale, group,
    D: tl.constexpr, W: tl.constexpr, BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: M queries of a head, their gradient, and delta [B, H, Q], which the keys' kernel reads."""
    q, k, v = aligned(q, BY), aligned(k, BY), aligned(v, BY)
    out, d_out, d_q = aligned(out, BY), aligned(d_out, BY), aligned(d_q, BY)
    b, h, block = block_of(tiles, sizes, sizes.heads)
    first = block * M
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    slope = operand(tile(d_out, b, h, first, sizes.queries, M, D, W))
    found = operand(tile(out, b, h, first, sizes.queries, M, D, W))
    mean = tl.sum(slope.to(tl.float32) * found.to(tl.float32), 1)
    put_row(delta, b, sizes.heads, h, first + rows, sizes, mean)
    left = held(q, b, h, first, sizes.queries, M, D, W, C)
    if C < W:
        slope = None
    log_sum = row(lse, b, sizes.heads, h, first + rows, sizes)
    sums = tl.zeros([M, W], tl.float32)
    for PARTIAL in tl.static_range(2):
        start, stop = run(tiles, block, PARTIAL)
        for at in range(start, stop):
            key = other(tiles, at, PARTIAL) * N
            right = operand(tile(k, b, h // group, key, sizes.queries, N, D, W))
            s = product(
                left, right, q, h, first, sizes.queries, k, h // group, key, sizes.queries, b, M, N, D, C
            ) * (scale * LOG2_E)
            s = masked(
                s, tiles, at, documents, b, first, key, rows[:, None], cols[None, :], sizes, M, PARTIAL
            )
            p = tl.exp2(s - log_sum[:, None])
            value = held(v, b, h // group, key, sizes.queries, N, D, W, C)
            d_p = product(
                slope, value, d_out, h, first, sizes.queries, v, h // group, key, sizes.queries, b, M, N, D, C
            )
            if drop is not None:
                stays = kept_anew(drop, b, h, first, key, sizes, M, N)
                d_p = tl.where(stays, d_p * drop.factor, 0.0)
            d_s = as_operand(p * (d_p - mean[:, None]), k.data.dtype.element_ty)
            sums += tl.dot(d_s, right, input_precision="ieee")
    put(d_q, b, h, first, sizes.queries, narrowed(sums * scale, d_q.data.dtype.element_ty), M, D, W)


@triton.jit
def block_sparse_key_kernel(
    q, k, v, lse, d_out, delta, d_k, d_v, tiles, documents, drop, sizes, scale, group,
    OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    D: tl.constexpr, W: tl.constexpr, BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: N keys of a key head, and all query heads that read it; gradients of keys, of values, or of both."""
    q, k, v = aligned(q, BY), aligned(k, BY), aligned(v, BY)
    d_out, d_k, d_v = aligned(d_out, BY), aligned(d_k, BY), aligned(d_v, BY)
    b, head, block = block_of(tiles, sizes, sizes.heads // group)
    first = block * N
    rows, cols = tl.arange(0, M), tl.arange(0, N)
    left = held(k, b, head, first, sizes.queries, N, D, W, C)
    if OF_KEYS:
        value = held(v, b, head, first, sizes.queries, N, D, W, C)
    like = q.data.dtype.element_ty
    d_keys = tl.zeros([N, W], tl.float32)
    d_values = tl.zeros([N, W], tl.float32)
    for h in range(head * group, (head + 1) * group):
        for PARTIAL in tl.static_range(2):
            start, stop = run(tiles, block, PARTIAL)
            for at in range(start, stop):
                query = other(tiles, at, PARTIAL) * M
                right = held(q, b, h, query, sizes.queries, M, D, W, C)
                s = product(
                    left, right, k, head, first, sizes.queries, q, h, query, sizes.queries, b, N, M, D, C
                ) * (scale * LOG2_E)
                s = masked(
                    s, tiles, at, documents, b, query, first, rows[None, :], cols[:, None], sizes, M, PARTIAL
                )
                p = tl.exp2(s - row(lse, b, sizes.heads, h, query + rows, sizes)[None, :])
                slope = held(d_out, b, h, query, sizes.queries, M, D, W, C)
                if drop is not None:
                    stays = tl.trans(kept_anew(drop, b, h, query, first, sizes, M, N))
                if OF_VALUES:
                    used = p
                    if drop is not None:
                        used = tl.where(stays, p, 0.0)
                    if C < W:
                        slope = operand(tile(d_out, b, h, query, sizes.queries, M, D, W))
                    d_values += tl.dot(as_operand(used, like), slope, input_precision="ieee")
                if OF_KEYS:
                    d_p = product(
                        value,
                        slope,
                        v,
                        head,
                        first,
                        sizes.queries,
                        d_out,
                        h,
                        query,
                        sizes.queries,
                        b,
                        N,
                        M,
                        D,
                        C,
                    )
                    if drop is not None:
                        d_p = tl.where(stays, d_p * drop.factor, 0.0)
                    d_s = p * (d_p - row(delta, b, sizes.heads, h, query + rows, sizes)[None, :])
                    if C < W:
                        right = operand(tile(q, b, h, query, sizes.queries, M, D, W))
                    d_keys += tl.dot(as_operand(d_s, like), right, input_precision="ieee")
    if OF_KEYS:
        put(d_k, b, head, first, sizes.queries, narrowed(d_keys * scale, d_k.data.dtype.element_ty), N, D, W)
    if OF_VALUES:
        if drop is not None:
            d_values *= drop.factor
        put(d_v, b, head, first, sizes.queries, narrowed(d_values, d_v.data.dtype.element_ty), N, D, W)
