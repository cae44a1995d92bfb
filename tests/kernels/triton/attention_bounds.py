"""How far rounding may carry attention's results: its errors have either sign, so their variances add.

To first order, and as if all were independent but where a whole row shares one. A rounding to u is off by at most u of
a number, evenly spread: a variance of u^2 / 3 of its square, at most. Of a sum of n numbers x, one after the other,
partial sums are rounded: they grow as a random walk does, which gives n / 2 times that of the sum of x^2. Allowed are
four standard deviations of the element of a tensor that has the largest.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D head dimension; of most: [B, H, Q, S].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head

FINE = (2.0**-24) ** 2 / 3
"""Variance of a rounding to fp32, relative. What exp and tanh are off by, some 2^-23, has four times that."""


class Scores(NamedTuple):
    """Scores of all pairs, with variances.

    Attributes:
        found: with cap and bias, -inf where nothing is seen.
        var: of them.
        bent, slope: tanh of them before the cap and its derivative; 0 and 1 without one.
        var_bent: of the former.
    """

    found: Tensor
    var: Tensor
    bent: Tensor
    slope: Tensor
    var_bent: Tensor

    @staticmethod
    def of(q: Tensor, k: Tensor, bias: Tensor | None, cap: float | None, seen: Tensor | None) -> Scores:
        """Of queries and keys [B, H, S, D]; `bias`: [H, Q, S]."""
        scale, dim = q.shape[-1] ** -0.5, q.shape[-1]
        s = q @ k.mT * scale
        var = FINE * (scale**2 * dim / 2 * (q**2 @ k.mT**2) + 2 * s**2)
        bent, slope, var_bent = torch.zeros_like(s), torch.ones_like(s), torch.zeros_like(s)
        if cap:
            bent = (s / cap).tanh()
            slope = 1 - bent**2
            var_bent = slope**2 * var / cap**2 + 4 * FINE
            s, var = cap * bent, cap**2 * (var_bent + FINE * bent**2)
        if bias is not None:
            s = s + bias
            var = var + FINE * (s**2 + bias**2)
        if seen is not None:
            s, var = s.masked_fill(~seen, -torch.inf), var.masked_fill(~seen, 0)
        return Scores(s, var, bent, slope, var_bent)


class Weights(NamedTuple):
    """Weights and what they give, with variances.

    Attributes:
        p: before dropout.
        used: after it.
        lse: log-sum-exps [B, H, Q, 1], and `var_lse` of what rounds them, not of what scores bring.
        exponents: variance of what exp is taken of, and of exp itself.
        relative: variance of p, relative: a weight's own exponent counts less, the others' count, the more they weigh.
        out: [B, H, Q, D]; `var_out`.
    """

    p: Tensor
    used: Tensor
    lse: Tensor
    var_lse: Tensor
    exponents: Tensor
    relative: Tensor
    out: Tensor
    var_out: Tensor

    @staticmethod
    def of(s: Scores, v: Tensor, factor: Tensor | float, sink: Tensor | None, narrow: float) -> Weights:
        """`factor`: dropout's; `narrow`: variance of a rounding to the operands' dtype, relative."""
        lse = s.found.logsumexp(-1, keepdim=True)
        if sink is not None:
            lse = torch.logaddexp(lse, sink[:, None, None])
        lse = torch.where(lse.isfinite(), lse, 0.0)
        p = (s.found - lse).exp()
        length = v.shape[-2] / 2
        exponents = s.var + FINE * (torch.where(p > 0, s.found - lse, 0.0) ** 2 + 4)
        own = p**2 * exponents
        shared = own.sum(-1, keepdim=True)
        relative = exponents * (1 - p) ** 2 + (shared - own).clamp(min=0)
        total = FINE * length * (p**2).sum(-1, keepdim=True)
        used = p * factor
        out = used @ v
        var_out = (own * factor**2) @ v**2 - 2 * out * ((own * factor) @ v) + (shared + total) * out**2
        var_out = var_out.clamp(min=0) + (narrow + FINE * length) * (used**2 @ v**2) + narrow * out**2
        return Weights(p, used, lse, total + FINE * (lse**2 + 4), exponents, relative, out, var_out)


def tolerances(
    x: dict[str, Tensor], bias: Tensor | None, cap: float | None, seen: Tensor | None, factor: Tensor | float,
    d_out: Tensor, unit: float,
) -> dict[str, float]:  # fmt: skip
    """Of `out` and of the gradients of q, k, v, bias and sink, absolute.

    Args:
        x: `q`, `k`, `v` [B, H or K, S, D] and, if there is one, `sink` [H]; fp64.
        bias: [H, Q, S].
        cap: of the scores.
        seen: bool [B or 1, H or 1, Q, S].
        factor: dropout's, [B, H, Q, S].
        d_out: gradient of the output.
        unit: unit roundoff of q, k and v.
    """
    narrow, q = unit**2 / 3, x["q"]
    k, v, scale = per_query_head(x["k"], q), per_query_head(x["v"], q), q.shape[-1] ** -0.5
    s = Scores.of(q, k, bias, cap, seen)
    w = Weights.of(s, v, factor, x.get("sink"), narrow)
    keys, queries = k.shape[-2] / 2, q.shape[-2] * q.shape[1] / x["k"].shape[1] / 2
    dp = d_out @ v.mT * factor
    delta = (d_out * w.out).sum(-1, keepdim=True)
    ds = w.p * (dp - delta)
    var_delta = _var_delta(s, w, dp, ds, delta, d_out, narrow)
    var_dp = FINE * d_out.shape[-1] / 2 * (d_out**2 @ v.mT**2) * factor**2
    relative = w.relative + w.var_lse
    var_ds = w.p**2 * (var_dp + FINE * (dp**2 + delta**2)) + ds**2 * relative
    product, weight = ds * s.slope, w.p * s.slope
    var_product = s.slope**2 * var_ds + ds**2 * 4 * s.bent**2 * s.var_bent + narrow * product**2
    own_q = scale**2 * ((var_product + FINE * keys * product**2) @ k**2 + var_delta * (weight @ k) ** 2)
    own_k = scale**2 * (var_product + weight**2 * var_delta + FINE * queries * product**2).mT @ q**2
    own_v = (w.used**2 * (relative + narrow + FINE * queries)).mT @ d_out**2
    d_k, d_v = scale * product.mT @ q, w.used.mT @ d_out
    var = {
        "out": w.var_out,
        "q": own_q + narrow * (scale * product @ k) ** 2,
        "k": _grouped(own_k, x["k"]) + narrow * _grouped(d_k, x["k"]) ** 2,
        "v": _grouped(own_v, x["v"]) + narrow * _grouped(d_v, x["v"]) ** 2,
        "bias": (var_ds + w.p**2 * var_delta).sum(0),
    }
    if "sink" in x:
        below = x["sink"][:, None, None] - w.lse
        off = (
            w.var_lse
            + (w.p**2 * w.exponents).sum(-1, keepdim=True)
            + FINE * (below**2 + 4 + len(q) * q.shape[-2] / 2)
        )
        var["sink"] = (below.exp() ** 2 * (var_delta + delta**2 * off)).sum((0, 2))
    return {name: 4 * float(each.max()) ** 0.5 + 2.0**-44 for name, each in var.items()}


def _var_delta(
    s: Scores, w: Weights, dp: Tensor, ds: Tensor, delta: Tensor, d_out: Tensor, narrow: float
) -> Tensor:
    """Of the sums of outputs times their gradients: exponents that are off move them by ds, and weights, outputs and
    their products are rounded."""
    length = w.p.shape[-1] / 2
    found = (w.exponents * ds**2 + (narrow + FINE * length) * (w.p * dp) ** 2).sum(-1, keepdim=True)
    found += (narrow + FINE * d_out.shape[-1] / 2) * (d_out * w.out).square().sum(-1, keepdim=True)
    return found + FINE * length * (w.p**2).sum(-1, keepdim=True) * delta**2


def _grouped(each: Tensor, like: Tensor) -> Tensor:
    """Sums of the query heads that read a key head."""
    return each.unflatten(1, (like.shape[1], -1)).sum(2)
