"""How far rounding may carry map distillation, by Monte Carlo arithmetic (Parker 1997): everything is computed in fp64,
a few times, with normal noise as large as the roundings of fp32 where a kernel rounds, and compared with the same
without noise.

A sum of D products is off by half of 2^-24 of their absolute sum; anything else by 2^-24 of its parts; a power e^x also
by |x| 2^-24. Gradients of scores are rounded to u before their products, results again: a rounding's root mean square
is u / 2 at most. No rounding that is as large as these is likely to reach six times their root mean square.

Shapes: B batch, H student heads, G teacher heads for each, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.slopes import block_of
from headway.kernels.maps.operands import Scores

FINE = 2.0**-24
_DRAWS = 8
_TIMES = 6.0


class Noise(NamedTuple):
    """Draws, or None for none at all."""

    draw: torch.Generator | None

    def __call__(self, x: Tensor, size: Tensor | float) -> Tensor:
        """x with noise whose root mean square is `size`."""
        if self.draw is None:
            return x
        return x + size * torch.randn(x.shape, generator=self.draw, dtype=x.dtype)


class Problem(NamedTuple):
    """What is computed, on CPUs, in fp64.

    Attributes:
        teacher, student: scores.
        loss: its name.
        seen: bool [B, 1, Q, S], false in rows that do not count.
        upstream: gradient of the sums, [B].
        rounding: u of queries and keys.
        rounding_bias: u of a bias.
    """

    teacher: Scores
    student: Scores
    loss: str
    seen: Tensor
    upstream: Tensor
    rounding: float
    rounding_bias: float = FINE


def tolerances(problem: Problem) -> dict[str, float]:
    """Of `sums`, `d_q`, `d_k` and `d_bias`: how far from exact the farthest element of each may be."""
    exact = _computed(problem, Noise(None))
    squares = {name: torch.zeros_like(x) for name, x in exact.items()}
    draw = torch.Generator().manual_seed(0)
    for _ in range(_DRAWS):
        for name, x in _computed(problem, Noise(draw)).items():
            squares[name] += (x - exact[name]) ** 2 / _DRAWS
    return {name: _TIMES * float(x.max()) ** 0.5 for name, x in squares.items()}


def _computed(problem: Problem, noise: Noise) -> dict[str, Tensor]:
    heads, seen = problem.student.q.shape[1], problem.seen
    s_BHQS = _scores(problem.student, noise)
    t_BHGQS = _scores(problem.teacher, noise).unflatten(1, (heads, -1))
    n_BHQ1 = seen.sum(-1, keepdim=True).clamp(min=1)
    if problem.loss == "scores":
        t_BHQS = t_BHGQS.mean(2)
        apart = noise(s_BHQS - t_BHQS, FINE * (s_BHQS.abs() + t_BHQS.abs()))
        value, ds = apart**2 / n_BHQ1, 2 * apart / n_BHQ1
    else:
        log_q = _log_weights(s_BHQS, seen, noise)
        log_p = _log_weights(t_BHGQS, seen.unsqueeze(2), noise).logsumexp(2) - math.log(t_BHGQS.shape[2])
        log_p = noise(log_p, FINE * (log_p.abs() + 1))
        value, ds = _divergence(problem.loss, log_p, log_q, seen, n_BHQ1, noise)
    return _gradients(problem, torch.where(seen, value, 0), torch.where(seen, ds, 0), noise)


def _scores(model: Scores, noise: Noise) -> Tensor:
    q, k = model.q, per_query_head(model.k, model.q)
    found = noise(q @ k.mT * model.scale, FINE / 2 * model.scale * q.abs() @ k.abs().mT)
    if model.bias is None:
        return found
    bias = block_of(model.bias).double()
    return noise(found + bias, FINE * (found.abs() + bias.abs()))


def _log_weights(scores: Tensor, seen: Tensor, noise: Noise) -> Tensor:
    """Logarithms of the softmax; 0 where nothing is seen."""
    lse = torch.where(seen, scores, -torch.inf).logsumexp(-1, keepdim=True)
    lse = torch.where(lse.isfinite(), lse, 0)
    found = scores - noise(lse, FINE * (lse.abs() + 2))
    return torch.where(seen, noise(found, FINE * found.abs()), 0)


def _divergence(
    loss: str, log_p: Tensor, log_q: Tensor, seen: Tensor, n: Tensor, noise: Noise
) -> tuple[Tensor, Tensor]:
    """What a key adds to its row's loss, and the gradient of its score."""
    p, q = (noise(x.exp(), x.exp() * FINE * (2 + x.abs())) for x in (log_p, log_q))
    p, q = torch.where(seen, p, 0), torch.where(seen, q, 0)
    parts = FINE * (log_p.abs() + log_q.abs() + 2)
    if loss == "kl":
        return noise(p * (log_p - log_q) + (q - p), p * parts + q * FINE), noise(q - p, FINE * (p + q))
    if loss == "reverse_kl":
        value = noise(q * (log_q - log_p) + (p - q), q * parts + p * FINE)
        centre = value.sum(-1, keepdim=True)
        return value, noise(q * (log_q - log_p - centre), q * (parts + FINE * centre.abs()))
    if loss == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        log_m = noise(log_m, parts)
        pull = noise(q * (log_q - log_m) / 2, q * parts)
        centre = pull.sum(-1, keepdim=True)
        value = noise(p * (log_p - log_m) / 2, p * parts) + pull
        return value, noise(pull - q * centre, q * parts)
    apart = noise(q - p, FINE * (p + q))
    pull = 2 * q * apart / n
    centre = pull.sum(-1, keepdim=True)
    return apart**2 / n, noise(pull - q * centre, FINE * (pull.abs() + q * centre.abs()))


def _gradients(problem: Problem, value: Tensor, ds: Tensor, noise: Noise) -> dict[str, Tensor]:
    """Sums and gradients, as kernels compute them of losses and gradients of scores."""
    student, u = problem.student, problem.rounding
    heads, group = value.shape[1], value.shape[1] // student.k.shape[1]
    up = (problem.upstream / heads).reshape(-1, 1, 1, 1)
    k = per_query_head(student.k, student.q)
    rows = noise(value.sum(-1), FINE * value.abs().sum(-1))
    rounded = noise(ds, u / 2 * ds.abs()) if u > FINE else ds
    d_q = noise(rounded @ k, FINE / 2 * ds.abs() @ k.abs()) * student.scale * up
    d_k = noise(rounded.mT @ student.q, FINE / 2 * ds.abs().mT @ student.q.abs()) * student.scale * up
    d_k = d_k.unflatten(1, (-1, group)).sum(2)
    found = {
        "sums": noise(rows.sum((1, 2)), FINE * rows.abs().sum((1, 2))) / heads,
        "d_q": noise(d_q, u / 2 * d_q.abs()),
        "d_k": noise(d_k, u / 2 * d_k.abs()),
    }
    if isinstance(student.bias, Tensor):
        d_bias = (up * ds).sum(0)
        d_bias = noise(d_bias, FINE * (up * ds).abs().sum(0) + problem.rounding_bias / 2 * d_bias.abs())
        found["d_bias"] = d_bias
    return found
