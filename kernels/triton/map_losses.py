"""Losses of attention maps in Triton kernels, key by key: what it adds to its row's loss, and its score's gradient.

With p = softmax(t) of the teacher, q = softmax(s) of the student and a row's loss D = sum_j f(p_j, q_j): dD/ds_j =
q_j (g_j - centre), g = df/dq, centre = sum_k q_k g_k.

    kl          f = p log(p / q)                  ds = q - p
    reverse_kl  f = q log(q / p)                  ds = q (log(q / p) - D)
    js          f = p/2 log(p / m) + q/2 log(q / m)   ds = q (log(q / m) / 2 - centre), m = (p + q) / 2
    mse         f = (q - p)^2 / n                 ds = q (2 (q - p) / n - centre), n: keys that the row sees
    scores      f = (s - t)^2 / n                 ds = 2 (s - t) / n
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


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
