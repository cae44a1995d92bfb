"""Triton kernels of map distillation: losses of attention maps and their gradients, tile by tile, no map in memory.

With scores t, s of teacher and student, p = softmax(t), q = softmax(s) and a row's loss D = sum_j f(p_j, q_j):
dD/ds_j = q_j (g_j - centre), g = df/dq, centre = sum_k q_k g_k. Log-sum-exps, D and centre are kept of every row;
the gradients' kernels compute the scores again (Dao et al. 2022, algorithm 4), and none adds by atomics: a program
owns what it writes.

    kl          f = p log(p / q)                  ds = q - p
    reverse_kl  f = q log(q / p)                  ds = q (log(q / p) - D)
    js          f = p/2 log(p / m) + q/2 log(q / m)   ds = q (log(q / m) / 2 - centre), m = (p + q) / 2
    mse         f = (q - p)^2 / n                 ds = q (2 (q - p) / n - centre), n: keys that the row sees
    scores      f = (s - t)^2 / n                 ds = 2 (s - t) / n

Where G teacher heads stand for a student's, p is the mean of their maps; for `scores`, t is the mean of their scores.

Shapes, `rows` and `cols`: see `map_tiles`.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.triton.map_tiles import (
    key_range,
    place_of,
    put,
    put_row,
    query_range,
    row,
    scores,
    sees,
    teacher_keys,
    teacher_queries,
    tile,
    wide,
)

# -- losses --------------------------------------------------------------------------------------------------------


@triton.jit
def teacher_map(left, right, teacher, lse, b, h, rows, cols, sizes, G: tl.constexpr, LOSS: tl.constexpr):
    """log p, or for `scores` t, of the G teacher heads of student head h; `left`, `right`: their tiles."""
    mean = scores(left[0], right[0], teacher, h * G, rows, cols, sizes)
    if LOSS == "scores":
        for g in tl.static_range(1, G):
            mean += scores(left[g], right[g], teacher, h * G + g, rows, cols, sizes)
        mean = mean / G
    else:
        mean -= row(lse, b, sizes.heads * G, h * G, rows, sizes)
        for g in tl.static_range(1, G):
            log_p = scores(left[g], right[g], teacher, h * G + g, rows, cols, sizes)
            log_p -= row(lse, b, sizes.heads * G, h * G + g, rows, sizes)
            mean = log_add(mean, log_p)
        if G > 1:
            mean -= tl.log(1.0 * G)
    return mean


@triton.jit
def log_add(x, y):
    """log(e^x + e^y)."""
    return tl.maximum(x, y) + tl.log(1 + tl.exp(-tl.abs(x - y)))


@triton.jit
def log_mean(x, y):
    """log((e^x + e^y) / 2), finite where both powers vanish."""
    return tl.log(tl.maximum(0.5 * (tl.exp(x) + tl.exp(y)), 1e-37))


@triton.jit
def terms(t, s, LOSS: tl.constexpr):
    """f and q g of every key, n being 1; t, s: log p and log q, for `scores` the scores.

    Weights sum to 1, so that q - p adds nothing to a divergence but what cancels, to first order, what rounding of the
    log-sum-exps did to it. A centre that is not summed is 0: `kl` needs none, and that of `reverse_kl` is D.
    """
    weighted = tl.zeros_like(s)
    if LOSS == "kl":
        value = tl.exp(t) * (t - s) + (tl.exp(s) - tl.exp(t))
    elif LOSS == "reverse_kl":
        value = tl.exp(s) * (s - t) + (tl.exp(t) - tl.exp(s))
    elif LOSS == "js":
        log_m = log_mean(t, s)
        weighted = 0.5 * tl.exp(s) * (s - log_m)
        value = 0.5 * tl.exp(t) * (t - log_m) + weighted
    elif LOSS == "mse":
        apart = tl.exp(s) - tl.exp(t)
        value = apart * apart
        weighted = 2 * tl.exp(s) * apart
    else:
        value = (s - t) * (s - t)
    return value, weighted


@triton.jit
def score_gradient(t, s, centre, share, LOSS: tl.constexpr):
    """dD/ds of every key; t, s: log p and log q, for `scores` the scores; `share`: 1 / n."""
    if LOSS == "kl":
        found = tl.exp(s) - tl.exp(t)
    elif LOSS == "reverse_kl":
        found = tl.exp(s) * (s - t - centre)
    elif LOSS == "js":
        found = tl.exp(s) * (0.5 * (s - log_mean(t, s)) - centre)
    elif LOSS == "mse":
        found = tl.exp(s) * (2 * share * (tl.exp(s) - tl.exp(t)) - centre)
    else:
        found = 2 * share * (s - t)
    return found


@triton.jit
def gradient_dot(d_scores, x):
    """d_scores x, fp32. The gradient of a score may be as small as 1 / n^2, which fp16 cannot hold: its products are of
    tf32, whose mantissa is fp16's."""
    if x.dtype == tl.float16:
        found = tl.dot(d_scores, x.to(tl.float32), input_precision="tf32")
    else:
        found = tl.dot(d_scores.to(x.dtype), x, input_precision="ieee")
    return found


# -- rows: a program has M queries of one head ---------------------------------------------------------------------


@triton.jit
def log_sums_kernel(
    model, seen, sizes, lse,
    CAUSAL: tl.constexpr, D: tl.constexpr, W: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the rows' scores, [B, H, Q], of a model with `sizes.heads` heads; 0 where nothing is seen."""
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows = first + tl.arange(0, M)
    q = tile(model.q, b, h, first, sizes.queries, M, D, W)
    top = tl.full([M], -1e38, tl.float32)
    total = tl.zeros([M], tl.float32)
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = key + tl.arange(0, N)
        k = tile(model.k, b, h // model.group, key, sizes.keys, N, D, W)
        s = scores(q, k, model, h, rows[:, None], cols[None, :], sizes)
        s = tl.where(sees(seen, b, rows[:, None], cols[None, :], sizes, CAUSAL), s, float("-inf"))
        top, total, _, _ = more(top, total, s)
    value = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), 0.0)
    put_row(lse, b, sizes.heads, h, rows, sizes, value)


@triton.jit
def more(top, total, s):
    """Maxima of the rows and sums of e^(s - top), s added to them; also e^(s - top), and what old sums shrink by."""
    new = tl.maximum(top, tl.max(s, 1))
    shrunk = tl.exp(top - new)
    powers = tl.exp(s - new[:, None])
    return new, total * shrunk + tl.sum(powers, 1), powers, shrunk


@triton.jit
def divergence_kernel(
    teacher, student, seen, sizes, lse_t, lse_s, values,
    LOSS: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`kl` or `reverse_kl` of every row and both log-sum-exps, [B, H, Q], in one pass, where G = 1:
    KL(p || q) = sum_j p_j (t_j - s_j) - lse_t + lse_s, whose last two are subtracted by their parts, which are exact to
    more digits where the models are alike."""
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows = first + tl.arange(0, M)
    q_t = tile(teacher.q, b, h, first, sizes.queries, M, D_T, W_T)
    q_s = tile(student.q, b, h, first, sizes.queries, M, D_S, W_S)
    top_t = tl.full([M], -1e38, tl.float32)
    top_s = tl.full([M], -1e38, tl.float32)
    total_t = tl.zeros([M], tl.float32)
    total_s = tl.zeros([M], tl.float32)
    apart = tl.zeros([M], tl.float32)
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = key + tl.arange(0, N)
        ok = sees(seen, b, rows[:, None], cols[None, :], sizes, CAUSAL)
        k_t = tile(teacher.k, b, h // teacher.group, key, sizes.keys, N, D_T, W_T)
        k_s = tile(student.k, b, h // student.group, key, sizes.keys, N, D_S, W_S)
        t = scores(q_t, k_t, teacher, h, rows[:, None], cols[None, :], sizes)
        s = scores(q_s, k_s, student, h, rows[:, None], cols[None, :], sizes)
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
    put_row(lse_t, b, sizes.heads, h, rows, sizes, tl.where(some, top_t + tl.log(total_t), 0.0))
    put_row(lse_s, b, sizes.heads, h, rows, sizes, tl.where(some, top_s + tl.log(total_s), 0.0))
    put_row(values, b, sizes.heads, h, rows, sizes, tl.where(some, value, 0.0))


@triton.jit
def terms_kernel(
    teacher, student, seen, sizes, lse_t, lse_s, values, centres, shares,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """D and centre of every row, [B, H, Q], and 1 / n, [B, 1, Q], from the log-sum-exps (`scores` needs none)."""
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    places = first + tl.arange(0, M)
    rows = places[:, None]
    q_t = teacher_queries(teacher, b, h, first, sizes, G, M, D_T, W_T)
    q_s = tile(student.q, b, h, first, sizes.queries, M, D_S, W_S)
    value = tl.zeros([M], tl.float32)
    centre = tl.zeros([M], tl.float32)
    count = tl.zeros([M], tl.float32)
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = (key + tl.arange(0, N))[None, :]
        ok = sees(seen, b, rows, cols, sizes, CAUSAL)
        k_t = teacher_keys(teacher, b, h, key, sizes, G, N, D_T, W_T)
        k_s = tile(student.k, b, h // student.group, key, sizes.keys, N, D_S, W_S)
        t = teacher_map(q_t, k_t, teacher, lse_t, b, h, rows, cols, sizes, G, LOSS)
        s = scores(q_s, k_s, student, h, rows, cols, sizes)
        if LOSS != "scores":
            s -= row(lse_s, b, sizes.heads, h, rows, sizes)
        each, weighted = terms(t, s, LOSS)
        value += tl.sum(tl.where(ok, each, 0.0), 1)
        centre += tl.sum(tl.where(ok, weighted, 0.0), 1)
        count += tl.sum(tl.where(ok, 1.0, 0.0), 1)
    share = 1 / tl.maximum(count, 1.0)
    if LOSS == "mse" or LOSS == "scores":
        value *= share
        centre *= share
    if LOSS == "reverse_kl":
        centre = value
    put_row(values, b, sizes.heads, h, places, sizes, value)
    put_row(centres, b, sizes.heads, h, places, sizes, centre)
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
    if LOSS != "scores" and LOSS != "kl":
        centre = row(centres, b, sizes.heads, h, rows, sizes)
    if LOSS == "mse" or LOSS == "scores":
        share = row(shares, b, 1, 0, rows, sizes)
    ok = sees(seen, b, rows, cols, sizes, CAUSAL)
    return tl.where(ok, score_gradient(t, s, centre, share, LOSS), 0.0)


@triton.jit
def query_gradient_kernel(
    teacher, student, seen, sizes, lse_t, lse_s, centres, shares, upstream, dq,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of M student queries; `upstream` [B]: that of a row's loss."""
    b, h, first = place_of(sizes.heads, sizes.queries, M)
    rows = (first + tl.arange(0, M))[:, None]
    q_t = teacher_queries(teacher, b, h, first, sizes, G, M, D_T, W_T)
    q_s = tile(student.q, b, h, first, sizes.queries, M, D_S, W_S)
    total = tl.zeros([M, W_S], tl.float32)
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    for key in range(start, stop, N):
        cols = (key + tl.arange(0, N))[None, :]
        k_t = teacher_keys(teacher, b, h, key, sizes, G, N, D_T, W_T)
        k_s = tile(student.k, b, h // student.group, key, sizes.keys, N, D_S, W_S)
        t = teacher_map(q_t, k_t, teacher, lse_t, b, h, rows, cols, sizes, G, LOSS)
        s = scores(q_s, k_s, student, h, rows, cols, sizes)
        ds = masked_gradient(t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS, CAUSAL)
        total += gradient_dot(ds, k_s)
    total *= student.scale * tl.load(upstream + b)
    put(dq, b, h, first, sizes.queries, total, M, D_S, W_S)


@triton.jit
def key_gradient_kernel(
    teacher, student, seen, sizes, lse_t, lse_s, centres, shares, upstream, dk,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of N student keys, summed over the query heads that read them. Scores are [N, M]: as they are, they
    are what the last product needs on its left."""
    b, key_head, first = place_of(sizes.heads // student.group, sizes.keys, N)
    cols = (first + tl.arange(0, N))[:, None]
    k_s = tile(student.k, b, key_head, first, sizes.keys, N, D_S, W_S)
    total = tl.zeros([N, W_S], tl.float32)
    start, stop = query_range(seen, b, first, sizes, CAUSAL, M, N)
    for member in range(student.group):
        h = key_head * student.group + member
        k_t = teacher_keys(teacher, b, h, first, sizes, G, N, D_T, W_T)
        for query in range(start, stop, M):
            rows = (query + tl.arange(0, M))[None, :]
            q_t = teacher_queries(teacher, b, h, query, sizes, G, M, D_T, W_T)
            q_s = tile(student.q, b, h, query, sizes.queries, M, D_S, W_S)
            t = teacher_map(k_t, q_t, teacher, lse_t, b, h, rows, cols, sizes, G, LOSS)
            s = scores(k_s, q_s, student, h, rows, cols, sizes)
            ds = masked_gradient(t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS, CAUSAL)
            total += gradient_dot(ds, q_s)
    total *= student.scale * tl.load(upstream + b)
    put(dk, b, key_head, first, sizes.keys, total, N, D_S, W_S)


@triton.jit
def bias_gradient_kernel(
    teacher, student, seen, sizes, lse_t, lse_s, centres, shares, upstream, d_bias,
    LOSS: tl.constexpr, G: tl.constexpr, CAUSAL: tl.constexpr,
    D_T: tl.constexpr, W_T: tl.constexpr, D_S: tl.constexpr, W_S: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of the student's bias, contiguous [H, Q, K], summed over samples."""
    h, key_block, first = place_of(tl.cdiv(sizes.keys, N), sizes.queries, M)
    key = key_block * N
    rows = (first + tl.arange(0, M))[:, None]
    cols = (key + tl.arange(0, N))[None, :]
    total = tl.zeros([M, N], tl.float32)
    for b in range(sizes.batch):
        q_t = teacher_queries(teacher, b, h, first, sizes, G, M, D_T, W_T)
        k_t = teacher_keys(teacher, b, h, key, sizes, G, N, D_T, W_T)
        q_s = tile(student.q, b, h, first, sizes.queries, M, D_S, W_S)
        k_s = tile(student.k, b, h // student.group, key, sizes.keys, N, D_S, W_S)
        t = teacher_map(q_t, k_t, teacher, lse_t, b, h, rows, cols, sizes, G, LOSS)
        s = scores(q_s, k_s, student, h, rows, cols, sizes)
        ds = masked_gradient(t, s, seen, lse_s, centres, shares, b, h, rows, cols, sizes, LOSS, CAUSAL)
        total += ds * tl.load(upstream + b)
    start = d_bias + wide(h) * sizes.queries * sizes.keys
    inside = (rows < sizes.queries) & (cols < sizes.keys)
    tl.store(start + wide(rows) * sizes.keys + cols, total, mask=inside)
