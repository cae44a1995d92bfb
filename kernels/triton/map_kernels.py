"""Triton kernels of map distillation: losses of attention maps and their gradients, tile by tile, no map in memory.

Log-sum-exps of all rows are kept, and of a row's loss what `map_losses` calls the centre; the gradients' kernels
compute the scores again (Dao et al. 2022, algorithm 4), and none adds by atomics: a program owns what it writes. `kl`
and `reverse_kl` of single teacher heads are summed beside the log-sum-exps, in one pass; other losses know no term
before both log-sum-exps, and take a pass over each model first.

Where G teacher heads stand for a student's, p is the mean of their maps; for `scores`, t is the mean of their scores.

Queries of a program are read once, and keys once by every block of queries that may see them, as nothing smaller than a
sequence fits into a multiprocessor; of the keys' kernel vice versa. Of several teacher heads, and of wide heads, both
are read again for every tile, head by head and W columns by W columns, as in any product of matrices: so any number and
any width fits, and caches hold what a program reads again. A gradient takes a launch for every 128 columns of a head,
each of which computes scores anew. Numbers of documents, places and log-sum-exps are read once a tile: they are some
hundredths of it.

Shapes: see `map_tiles`; D_T and D_S are head dimensions of teacher and student, W_T and W_S the powers of two that hold
them, or how many columns of wide heads are multiplied at once.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.triton.attention_tiles import keys_seen, queries_seen
from headway.kernels.triton.map_losses import log_add, score_gradient, terms
from headway.kernels.triton.map_tiles import (
    aligned,
    aligned_model,
    chunk,
    key_range,
    place_of,
    put,
    put_row,
    row,
    scores,
    sees,
    tile,
    wide,
)
from headway.kernels.triton.numbers import as_operand, narrowed, operand

# -- maps ----------------------------------------------------------------------------------------------------------


@triton.jit
def along(first, LAST: tl.constexpr, N: tl.constexpr):
    """N places from `first` on, along the last or the first dim of a tile."""
    place = first + tl.arange(0, N)
    if LAST:
        found = place[None, :]
    else:
        found = place[:, None]
    return found


@triton.jit
def held(x, b, head, first, length, HELD: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """N rows of a head where they are held, else None: `head_scores` then reads them, in chunks."""
    found = None
    if HELD and D <= W:
        found = operand(chunk(x, b, head, first, length, 0, N, D, W))
    return found


@triton.jit
def head_scores(
    queries, keys, model, b, head, rows, cols, query, key, sizes,
    TURNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Scores of a head, [M, N], if TURNED [N, M]; `queries`, `keys`: tiles, those that are held."""
    key_head = head // model.group
    products = tl.zeros([N, M] if TURNED else [M, N], tl.float32)
    for column in range(0, D, W):
        left = queries
        right = keys
        if queries is None:
            left = operand(chunk(model.q, b, head, query, sizes.queries, column, M, D, W))
        if keys is None:
            right = operand(chunk(model.k, b, key_head, key, sizes.keys, column, N, D, W))
        if TURNED:
            products = tl.dot(right, tl.trans(left), products, input_precision="ieee")
        else:
            products = tl.dot(left, tl.trans(right), products, input_precision="ieee")
    return scores(products, model, head, rows, cols, sizes)


@triton.jit
def teacher_map(
    queries, keys, teacher, lse, b, h, rows, cols, query, key, sizes, LOSS: tl.constexpr, G: tl.constexpr,
    TURNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """log p, or for `scores` t, of the G teacher heads of student head h; tiles as in `head_scores`."""
    mean = tl.full([N, M] if TURNED else [M, N], 0.0 if LOSS == "scores" else float("-inf"), tl.float32)
    for head in range(h * G, h * G + G):
        found = head_scores(
            queries, keys, teacher, b, head, rows, cols, query, key, sizes, TURNED, M, N, D, W
        )
        if LOSS != "scores":
            found -= row(lse, b, sizes.heads * G, head, rows, sizes)
        if G == 1:
            mean = found
        elif LOSS == "scores":
            mean += found / G
        else:
            mean = log_add(mean, found)
    if G > 1 and LOSS != "scores":
        mean -= tl.log(1.0 * G)
    return mean


# -- rows: a program has M queries of one head ---------------------------------------------------------------------


@triton.jit
def more(top, total, s):
    """Maxima of the rows and sums of e^(s - top), s added to them; also e^(s - top), and what old sums shrink by."""
    new = tl.maximum(top, tl.max(s, 1))
    shrunk = tl.exp(top - new)
    powers = tl.exp(s - new[:, None])
    return new, total * shrunk + tl.sum(powers, 1), powers, shrunk


@triton.jit
def map_log_sums_kernel(
    model, seen, spans, sizes, lse,
    CAUSAL: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the rows' scores, [B, H, Q], of a model with `sizes.heads` heads; 0 where nothing is seen."""
    model = aligned_model(model, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    places = first + tl.arange(0, M)
    rows = places[:, None]
    q = held(model.q, b, h, first, sizes.queries, True, M, D, W)
    top = tl.full([M], -1e38, tl.float32)
    total = tl.zeros([M], tl.float32)
    start, stop = keys_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = along(key, True, N)
        s = head_scores(q, None, model, b, h, rows, cols, first, key, sizes, False, M, N, D, W)
        s = tl.where(sees(seen, b, rows, cols, sizes, CAUSAL), s, float("-inf"))
        top, total, _, _ = more(top, total, s)
    value = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    put_row(lse, b, sizes.heads, h, places, sizes, value)


@triton.jit
def map_divergence_kernel(
    teacher, student, seen, spans, sizes, lse_t, lse_s, values,
    LOSS: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`kl` or `reverse_kl` of every row and both log-sum-exps, [B, H, Q], in one pass, where G = 1:
    KL(p || q) = sum_j p_j (t_j - s_j) - lse_t + lse_s, whose last two are subtracted by their parts, which are exact to
    more digits where the models are alike."""
    teacher, student = aligned_model(teacher, BY), aligned_model(student, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    places = first + tl.arange(0, M)
    rows = places[:, None]
    q_t = held(teacher.q, b, h, first, sizes.queries, True, M, D_T, W_T)
    q_s = held(student.q, b, h, first, sizes.queries, True, M, D_S, W_S)
    top_t = tl.full([M], -1e38, tl.float32)
    top_s = tl.full([M], -1e38, tl.float32)
    total_t = tl.zeros([M], tl.float32)
    total_s = tl.zeros([M], tl.float32)
    apart = tl.zeros([M], tl.float32)
    start, stop = keys_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = along(key, True, N)
        ok = sees(seen, b, rows, cols, sizes, CAUSAL)
        t = head_scores(q_t, None, teacher, b, h, rows, cols, first, key, sizes, False, M, N, D_T, W_T)
        s = head_scores(q_s, None, student, b, h, rows, cols, first, key, sizes, False, M, N, D_S, W_S)
        top_t, total_t, powers_t, shrunk_t = more(top_t, total_t, tl.where(ok, t, float("-inf")))
        top_s, total_s, powers_s, shrunk_s = more(top_s, total_s, tl.where(ok, s, float("-inf")))
        if LOSS == "kl":
            apart = apart * shrunk_t + tl.sum(powers_t * (t - s), 1)
        else:
            apart = apart * shrunk_s + tl.sum(powers_s * (s - t), 1)
    some = total_t > 0
    total_t = tl.where(some, total_t, 1.0)
    total_s = tl.where(some, total_s, 1.0)
    between = (top_t - top_s) + tl.log(total_t / total_s)
    if LOSS == "kl":
        value = apart / total_t - between
    else:
        value = apart / total_s + between
    put_row(lse_t, b, sizes.heads, h, places, sizes, tl.where(some, top_t + tl.log(total_t), 0.0))
    put_row(lse_s, b, sizes.heads, h, places, sizes, tl.where(some, top_s + tl.log(total_s), 0.0))
    put_row(values, b, sizes.heads, h, places, sizes, tl.where(some, value, 0.0))


@triton.jit
def map_terms_kernel(
    teacher, student, seen, spans, sizes, lse_t, lse_s, values, centres, shares,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """D of every row, [B, H, Q], from the log-sum-exps (`scores` needs none); the centre and 1 / n, [B, 1, Q], where
    they are not None."""
    teacher, student = aligned_model(teacher, BY), aligned_model(student, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    places = first + tl.arange(0, M)
    rows = places[:, None]
    q_t = held(teacher.q, b, h, first, sizes.queries, G == 1, M, D_T, W_T)
    q_s = held(student.q, b, h, first, sizes.queries, True, M, D_S, W_S)
    lse = 0.0
    if LOSS != "scores":
        lse = row(lse_s, b, sizes.heads, h, rows, sizes)
    value = tl.zeros([M], tl.float32)
    centre = tl.zeros([M], tl.float32)
    count = tl.zeros([M], tl.float32)
    start, stop = keys_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = along(key, True, N)
        ok = sees(seen, b, rows, cols, sizes, CAUSAL)
        t = teacher_map(
            q_t, None, teacher, lse_t, b, h, rows, cols, first, key, sizes, LOSS, G, False, M, N, D_T, W_T
        )  # fmt: skip
        s = head_scores(q_s, None, student, b, h, rows, cols, first, key, sizes, False, M, N, D_S, W_S) - lse
        each, weighted = terms(t, s, LOSS)
        value += tl.sum(tl.where(ok, each, 0.0), 1)
        centre += tl.sum(tl.where(ok, weighted, 0.0), 1)
        count += tl.sum(tl.where(ok, 1.0, 0.0), 1)
    share = 1 / tl.maximum(count, 1.0)
    if LOSS == "mse" or LOSS == "scores":
        value *= share
        centre *= share
    put_row(values, b, sizes.heads, h, places, sizes, value)
    if centres is not None:
        put_row(centres, b, sizes.heads, h, places, sizes, centre)
    if shares is not None:  # noqa: SIM102  # what is None is known when a kernel is compiled, h is not
        if h == 0:
            put_row(shares, b, 1, 0, places, sizes, share)


# -- gradients -----------------------------------------------------------------------------------------------------


@triton.jit
def masked_gradient(
    t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS: tl.constexpr, CAUSAL: tl.constexpr
):
    """dD/ds, 0 where a query does not see; t as `teacher_map` gives it, s scores."""
    centre = 0.0
    share = 1.0
    if LOSS != "scores":
        s -= row(lse_s, b, sizes.heads, h, rows, sizes)
    if centres is not None:
        centre = row(centres, b, sizes.heads, h, rows, sizes)
    if shares is not None:
        share = row(shares, b, 1, 0, rows, sizes)
    ok = sees(seen, b, rows, cols, sizes, CAUSAL)
    return tl.where(ok, score_gradient(t, s, centre, share, LOSS), 0.0)


@triton.jit
def gradient_dot(d_scores, x, total, like):
    """total + d_scores x, fp32; x of dtype `like` in memory. The gradient of a score may be as small as 1 / n^2, which
    fp16 cannot hold: its products are of tf32, whose mantissa is fp16's."""
    if like == tl.float16:
        total = tl.dot(d_scores, x.to(tl.float32), total, input_precision="tf32")
    else:
        total = tl.dot(as_operand(d_scores, like), x, total, input_precision="ieee")
    return total


@triton.jit
def map_queries_kernel(
    teacher, student, seen, spans, sizes, lse_t, lse_s, centres, shares, upstream, columns, dq,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    D_P: tl.constexpr, W_P: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of M student queries; `upstream` [B]: that of a row's loss. `columns`: those of the student's keys that
    a launch multiplies with, where it computes a part of wide heads; else None. `dq` has these columns alone."""
    teacher, student = aligned_model(teacher, BY), aligned_model(student, BY)
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows = along(first, False, M)
    q_t = held(teacher.q, b, h, first, sizes.queries, G == 1, M, D_T, W_T)
    q_s = held(student.q, b, h, first, sizes.queries, True, M, D_S, W_S)
    like = student.q.data.dtype.element_ty
    total = tl.zeros([M, W_P], tl.float32)
    start, stop = keys_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = along(key, True, N)
        k_s = held(student.k, b, h // student.group, key, sizes.keys, True, N, D_S, W_S)
        t = teacher_map(
            q_t, None, teacher, lse_t, b, h, rows, cols, first, key, sizes, LOSS, G, False, M, N, D_T, W_T
        )  # fmt: skip
        s = head_scores(q_s, k_s, student, b, h, rows, cols, first, key, sizes, False, M, N, D_S, W_S)
        ds = masked_gradient(t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS, CAUSAL)
        part = k_s
        if columns is not None:
            part = operand(tile(aligned(columns, BY), b, h // student.group, key, sizes.keys, N, D_P, W_P))
        total = gradient_dot(ds, part, total, like)
    total *= student.scale * tl.load(upstream + b)
    put(aligned(dq, BY), b, h, first, sizes.queries, narrowed(total, like), M, D_P, W_P)


@triton.jit
def map_keys_kernel(
    teacher, student, seen, spans, sizes, lse_t, lse_s, centres, shares, upstream, columns, dk,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    D_P: tl.constexpr, W_P: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of N student keys, summed over the query heads that read them. Scores are [N, M]: as they are, they
    are what the last product needs on its left. `columns`: of the student's queries; see `map_queries_kernel`."""
    teacher, student = aligned_model(teacher, BY), aligned_model(student, BY)
    b, key_head, first = place_of(sizes.heads // student.group, sizes.keys, N)
    cols = along(first, False, N)
    k_s = held(student.k, b, key_head, first, sizes.keys, True, N, D_S, W_S)
    like = student.k.data.dtype.element_ty
    total = tl.zeros([N, W_P], tl.float32)
    start, stop = queries_seen(seen, spans, b, first, sizes, CAUSAL, M, N)
    for member in range(student.group):
        h = key_head * student.group + member
        k_t = held(teacher.k, b, h // teacher.group, first, sizes.keys, G == 1, N, D_T, W_T)
        for query in range(start, stop, M):
            rows = along(query, True, M)
            q_s = held(student.q, b, h, query, sizes.queries, True, M, D_S, W_S)
            t = teacher_map(
            None, k_t, teacher, lse_t, b, h, rows, cols, query, first, sizes, LOSS, G, True, M, N, D_T, W_T
        )  # fmt: skip
            s = head_scores(q_s, k_s, student, b, h, rows, cols, query, first, sizes, True, M, N, D_S, W_S)
            ds = masked_gradient(t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS, CAUSAL)
            part = q_s
            if columns is not None:
                part = operand(tile(aligned(columns, BY), b, h, query, sizes.queries, M, D_P, W_P))
            total = gradient_dot(ds, part, total, like)
    total *= student.scale * tl.load(upstream + b)
    put(aligned(dk, BY), b, key_head, first, sizes.keys, narrowed(total, like), N, D_P, W_P)


@triton.jit
def map_bias_kernel(
    teacher, student, seen, sizes, lse_t, lse_s, centres, shares, upstream, d_bias,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    BY: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the student's bias, contiguous [H, Q, K], summed over samples."""
    teacher, student = aligned_model(teacher, BY), aligned_model(student, BY)
    h, key_block, first = place_of(tl.cdiv(sizes.keys, N), sizes.queries, M)
    key = key_block * N
    rows = along(first, False, M)
    cols = along(key, True, N)
    total = tl.zeros([M, N], tl.float32)
    samples = sizes.batch
    if not CAUSAL or seen.prefix is None:  # what is seen by places is the same of all samples
        start, stop = key_range(seen, 0, first, sizes, CAUSAL, M, N)
        samples = tl.where((key < stop) & (key + N > start), sizes.batch, 0)
    for b in range(samples):
        q_t = held(teacher.q, b, h, first, sizes.queries, G == 1, M, D_T, W_T)
        q_s = held(student.q, b, h, first, sizes.queries, True, M, D_S, W_S)
        k_s = held(student.k, b, h // student.group, key, sizes.keys, True, N, D_S, W_S)
        t = teacher_map(
            q_t, None, teacher, lse_t, b, h, rows, cols, first, key, sizes, LOSS, G, False, M, N, D_T, W_T
        )  # fmt: skip
        s = head_scores(q_s, k_s, student, b, h, rows, cols, first, key, sizes, False, M, N, D_S, W_S)
        ds = masked_gradient(t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS, CAUSAL)
        total += ds * tl.load(upstream + b)
    start = d_bias + wide(h) * sizes.queries * sizes.keys
    inside = (rows < sizes.queries) & (cols < sizes.keys)
    tl.store(start + wide(rows) * sizes.keys + cols, total, mask=inside)
