"""How far rounding may carry map distillation, by Monte Carlo arithmetic (Parker 1997): everything is computed in fp64,
a few times, with normal noise as large as the roundings of fp32 where a kernel rounds, and compared with the same
without noise.

A rounding's root mean square is at most half of its unit: 2^-25 of a result in fp32, or of the parts that it is of; of
a sum of D products, 2^-25 of their absolute sum. A power e^x is off by another |x| 2^-25, as GPUs multiply x by log2 e
first; a sum of rows or of their terms passes some sixteen roundings, or four times one. Gradients of scores are rounded
to 16 bits before their products, and results again. No element is likely to be further off than six times its root mean
square.

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
_HALF = FINE / 2
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
        apart = noise(s_BHQS - t_BHQS, _HALF * (s_BHQS.abs() + t_BHQS.abs()))
        value, ds = apart**2 / n_BHQ1, 2 * apart / n_BHQ1
    else:
        log_q = _log_weights(s_BHQS, seen, noise)
        log_p = _log_weights(t_BHGQS, seen.unsqueeze(2), noise).logsumexp(2) - math.log(t_BHGQS.shape[2])
        log_p = noise(log_p, _HALF * (log_p.abs() + 1))
        value, ds = _divergence(problem.loss, log_p, log_q, seen, n_BHQ1, noise)
    return _gradients(problem, torch.where(seen, value, 0), torch.where(seen, ds, 0), noise)


def _scores(model: Scores, noise: Noise) -> Tensor:
    q, k = model.q, per_query_head(model.k, model.q)
    found = noise(q @ k.mT * model.scale, _HALF * model.scale * q.abs() @ k.abs().mT)
    if model.bias is None:
        return found
    bias = block_of(model.bias).double()
    return noise(found + bias, _HALF * (found.abs() + bias.abs()))


def _log_weights(scores: Tensor, seen: Tensor, noise: Noise) -> Tensor:
    """Logarithms of the softmax; 0 where nothing is seen."""
    lse = torch.where(seen, scores, -torch.inf).logsumexp(-1, keepdim=True)
    lse = torch.where(lse.isfinite(), lse, 0)
    found = scores - noise(lse, _HALF * (lse.abs() + 2))
    return torch.where(seen, noise(found, _HALF * found.abs()), 0)


def _divergence(
    loss: str, log_p: Tensor, log_q: Tensor, seen: Tensor, n: Tensor, noise: Noise
) -> tuple[Tensor, Tensor]:
    """What a key adds to its row's loss, and the gradient of its score."""
    p, q = (noise(x.exp(), x.exp() * _HALF * (2 + x.abs())) for x in (log_p, log_q))
    p, q = torch.where(seen, p, 0), torch.where(seen, q, 0)
    parts = _HALF * (log_p.abs() + log_q.abs() + 2)
    if loss == "kl":
        return noise(p * (log_p - log_q) + (q - p), p * parts + q * _HALF), noise(q - p, _HALF * (p + q))
    if loss == "reverse_kl":
        value = noise(q * (log_q - log_p) + (p - q), q * parts + p * _HALF)
        centre = value.sum(-1, keepdim=True)
        return value, noise(q * (log_q - log_p - centre), q * (parts + _HALF * centre.abs()))
    if loss == "js":
        log_m = torch.logaddexp(log_p, log_q) - math.log(2)
        log_m = noise(log_m, _HALF * (log_m.abs() + 2))
        pull = noise(q * (log_q - log_m) / 2, _HALF * q * (log_q - log_m).abs())
        centre = pull.sum(-1, keepdim=True)
        value = noise(p * (log_p - log_m) / 2, _HALF * p * (log_p - log_m).abs()) + pull
        return value, noise(pull - q * centre, _HALF * (pull.abs() + q * centre.abs()))
    apart = noise(q - p, _HALF * (p + q))
    pull = 2 * q * apart / n
    centre = pull.sum(-1, keepdim=True)
    return apart**2 / n, noise(pull - q * centre, _HALF * (pull.abs() + q * centre.abs()))


def _gradients(problem: Problem, value: Tensor, ds: Tensor, noise: Noise) -> dict[str, Tensor]:
    """Sums and gradients, as kernels compute them of losses and gradients of scores."""
    student, u = problem.student, problem.rounding
    heads, group = value.shape[1], value.shape[1] // student.k.shape[1]
    up = (problem.upstream / heads).reshape(-1, 1, 1, 1)
    k = per_query_head(student.k, student.q)
    rows = noise(value.sum(-1), 4 * _HALF * value.abs().sum(-1))
    rounded = noise(ds, u / 2 * ds.abs()) if u > FINE else ds
    d_q = noise(rounded @ k, _HALF * ds.abs() @ k.abs()) * student.scale * up
    d_k = noise(rounded.mT @ student.q, _HALF * ds.abs().mT @ student.q.abs()) * student.scale * up
    d_k = d_k.unflatten(1, (-1, group)).sum(2)
    found = {
        "sums": noise(rows.sum((1, 2)), 4 * _HALF * rows.abs().sum((1, 2))) / heads,
        "d_q": noise(d_q, u / 2 * d_q.abs()),
        "d_k": noise(d_k, u / 2 * d_k.abs()),
    }
    if isinstance(student.bias, Tensor):
        d_bias = (up * ds).sum(0)
        d_bias = noise(d_bias, _HALF * (up * ds).abs().sum(0) + problem.rounding_bias / 2 * d_bias.abs())
        found["d_bias"] = d_bias
    return found
