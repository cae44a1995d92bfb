"""Triton kernels of softmax attention: output and log-sum-exps, and gradients from them, no map in memory.

With scores s_ij = cap tanh(scale q_i k_j / cap) + bias_ij and a sink's score t: lse_i = log(e^t + sum_j e^s_ij),
p_ij = e^(s_ij - lse_i), o_i = sum_j p_ij m_ij v_j, m dropout's mask over the chance of being kept. Backward (Dao et
al. 2022, algorithm 4), with delta_i = do_i o_i: dp_ij = m_ij do_i v_j, ds_ij = p_ij (dp_ij - delta_i), dv_j = sum_i
p_ij m_ij do_i, dbias_ij = ds_ij, and of products ds_ij (1 - tanh^2). A program owns what it writes, none adds by
atomics: delta, and gradients of queries, of keys with values, and of a bias have a kernel each; the last three
compute scores again.

Queries are read once; keys and values once by every block of queries that may see them, as nothing smaller than a
sequence fits into a multiprocessor, and numbers of documents, places and log-sum-exps once a tile: they are some
hundredths of it, and caches hold them.

Shapes: H query heads, M queries and N keys of a tile, D head dimension of queries and keys, D_V of values, W and W_V
the powers of two that hold them.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.triton.attention_tiles import capped_scores, kept, keys_seen, pulled, queries_seen
from headway.kernels.triton.map_kernels import more
from headway.kernels.triton.map_tiles import (
    aligned,
    aligned_model,
    key_range,
    place_of,
    put,
    put_row,
    row,
    sees,
    tile,
    wide,
)
from headway.kernels.triton.numbers import as_operand, narrowed, operand


@triton.jit
def attention_forward_kernel(
    model, v, sink, cap, seen, spans, drop, sizes, out, lse,
    CAUSAL: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_V: tl.constexpr, W_V: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program: M queries of a head. Rows that see nothing give 0, and without a sink a log-sum-exp of 0."""
    model, v, out = aligned_model(model, BY), aligned(v, BY), aligned(out, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows = first + tl.arange(0, M)
    q = operand(tile(model.q, b, h, first, sizes.queries, M, D, W))
    like = v.data.dtype.element_ty
    top = tl.full([M], -1e38, tl.float32)
    total = tl.zeros([M], tl.float32)
    found = tl.zeros([M, W_V], tl.float32)
    start, stop = keys_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = key + tl.arange(0, N)
        k_tile = operand(tile(model.k, b, h // model.group, key, sizes.keys, N, D, W))
        s, _ = capped_scores(q, k_tile, model, cap, h, rows[:, None], cols[None, :], sizes)
        s = tl.where(sees(seen, b, rows[:, None], cols[None, :], sizes, CAUSAL), s, float("-inf"))
        top, total, powers, shrunk = more(top, total, s)
        if drop is not None:
            powers = tl.where(kept(drop, b, h, first, key, sizes, M, N), powers, 0.0)
        v_tile = operand(tile(v, b, h // model.group, key, sizes.keys, N, D_V, W_V))
        found = tl.dot(as_operand(powers, like), v_tile, found * shrunk[:, None], input_precision="ieee")
    if sink is not None:
        own = tl.load(sink + h).to(tl.float32)
        new = tl.maximum(top, own)
        total = total * tl.exp(top - new) + tl.exp(own - new)
        found *= tl.exp(top - new)[:, None]
        top = new
    some = total > 0
    total = tl.where(some, total, 1.0)
    share = 1 / total
    if drop is not None:
        share *= drop.factor
    put(out, b, h, first, sizes.queries, narrowed(found * share[:, None], like), M, D_V, W_V)
    put_row(lse, b, sizes.heads, h, rows, sizes, tl.where(some, top + tl.log(total), 0.0))


@triton.jit
def attention_delta_kernel(
    sizes, out, d_out, delta, D_V: tl.constexpr, W_V: tl.constexpr, BY: tl.constexpr, M: tl.constexpr
):
    """A program: `delta` of M queries of a head. A kernel of its own: beside products its sums cost the registers that
    the products want, which is worse than reading the output's gradient once more."""
    out, d_out = aligned(out, BY), aligned(d_out, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    known = operand(tile(out, b, h, first, sizes.queries, M, D_V, W_V))
    slope = operand(tile(d_out, b, h, first, sizes.queries, M, D_V, W_V))
    found = tl.sum(slope.to(tl.float32) * known.to(tl.float32), 1)
    put_row(delta, b, sizes.heads, h, first + tl.arange(0, M), sizes, found)


@triton.jit
def attention_queries_kernel(
    model, v, cap, seen, spans, drop, sizes, lse, d_out, delta, dq,
    CAUSAL: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_V: tl.constexpr, W_V: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of M queries of a head."""
    model, v, d_out, dq = aligned_model(model, BY), aligned(v, BY), aligned(d_out, BY), aligned(dq, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows = first + tl.arange(0, M)
    slope = operand(tile(d_out, b, h, first, sizes.queries, M, D_V, W_V))
    sums = row(lse, b, sizes.heads, h, rows, sizes)
    both = row(delta, b, sizes.heads, h, rows, sizes)
    q = operand(tile(model.q, b, h, first, sizes.queries, M, D, W))
    like = model.q.data.dtype.element_ty
    total = tl.zeros([M, W], tl.float32)
    start, stop = keys_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        k_tile = operand(tile(model.k, b, h // model.group, key, sizes.keys, N, D, W))
        v_tile = operand(tile(v, b, h // model.group, key, sizes.keys, N, D_V, W_V))
        _, _, ds = pulled(
            q, k_tile, slope, v_tile, sums, both, model, cap, seen, drop, sizes, b, h, first, key,
            CAUSAL, False, M, N,
        )  # fmt: skip
        total = tl.dot(as_operand(ds, like), k_tile, total, input_precision="ieee")
    put(dq, b, h, first, sizes.queries, narrowed(total * model.scale, like), M, D, W)


@triton.jit
def attention_keys_kernel(
    model, v, cap, seen, spans, drop, sizes, lse, d_out, delta, dk, dv,
    CAUSAL: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_V: tl.constexpr, W_V: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program: gradients of N keys and values of a head, summed over the query heads that read them; of either alone
    where `dk` or `dv` is None."""
    model, v, d_out = aligned_model(model, BY), aligned(v, BY), aligned(d_out, BY)
    b, key_head, first = place_of(sizes.heads // model.group, sizes.keys, N)
    k_tile = operand(tile(model.k, b, key_head, first, sizes.keys, N, D, W))
    v_tile = None
    if dk is not None:
        v_tile = operand(tile(v, b, key_head, first, sizes.keys, N, D_V, W_V))
    like = v.data.dtype.element_ty
    if dk is not None:
        d_key = tl.zeros([N, W], tl.float32)
    if dv is not None:
        d_value = tl.zeros([N, W_V], tl.float32)
    start, stop = queries_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for member in range(model.group):
        h = key_head * model.group + member
        for query in range(start, stop, M):
            rows = query + tl.arange(0, M)
            q = operand(tile(model.q, b, h, query, sizes.queries, M, D, W))
            slope = operand(tile(d_out, b, h, query, sizes.queries, M, D_V, W_V))
            sums = row(lse, b, sizes.heads, h, rows, sizes)
            both = sums
            if dk is not None:
                both = row(delta, b, sizes.heads, h, rows, sizes)
            used, _, ds = pulled(
                k_tile, q, v_tile, slope, sums, both, model, cap, seen, drop, sizes, b, h, query, first,
                CAUSAL, True, M, N,
            )  # fmt: skip
            if dv is not None:
                d_value = tl.dot(as_operand(used, like), slope, d_value, input_precision="ieee")
            if dk is not None:
                d_key = tl.dot(as_operand(ds, like), q, d_key, input_precision="ieee")
    if dk is not None:
        put(aligned(dk, BY), b, key_head, first, sizes.keys, narrowed(d_key * model.scale, like), N, D, W)
    if dv is not None:
        put(aligned(dv, BY), b, key_head, first, sizes.keys, narrowed(d_value, like), N, D_V, W_V)


@triton.jit
def attention_bias_kernel(
    model, v, cap, seen, drop, sizes, lse, d_out, delta, d_bias,
    CAUSAL: tl.constexpr, D: tl.constexpr, W: tl.constexpr, D_V: tl.constexpr, W_V: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A program: the gradient of a tile of a bias, fp32 contiguous [H, Q, K], summed over samples."""
    model, v, d_out = aligned_model(model, BY), aligned(v, BY), aligned(d_out, BY)
    h, key_block, first = place_of(tl.cdiv(sizes.keys, N), sizes.queries, M)
    key = key_block * N
    rows = first + tl.arange(0, M)
    total = tl.zeros([M, N], tl.float32)
    samples = sizes.batch
    if not CAUSAL or seen.prefix is None:  # what is seen by places is the same of all samples
        start, stop = key_range(seen, 0, first, sizes, CAUSAL, M, N)
        samples = tl.where((key < stop) & (key + N > start), sizes.batch, 0)
    for b in range(samples):
        q = operand(tile(model.q, b, h, first, sizes.queries, M, D, W))
        k_tile = operand(tile(model.k, b, h // model.group, key, sizes.keys, N, D, W))
        slope = operand(tile(d_out, b, h, first, sizes.queries, M, D_V, W_V))
        v_tile = operand(tile(v, b, h // model.group, key, sizes.keys, N, D_V, W_V))
        sums = row(lse, b, sizes.heads, h, rows, sizes)
        both = row(delta, b, sizes.heads, h, rows, sizes)
        _, ds, _ = pulled(
            q, k_tile, slope, v_tile, sums, both, model, cap, seen, drop, sizes, b, h, first, key,
            CAUSAL, False, M, N,
        )  # fmt: skip
        total += ds
    cols = key + tl.arange(0, N)
    head = d_bias + wide(h) * sizes.queries * sizes.keys
    inside = (rows < sizes.queries)[:, None] & (cols < sizes.keys)[None, :]
    tl.store(head + wide(rows)[:, None] * sizes.keys + cols[None, :], total, mask=inside)
