"""Losses of a row of weights, as sums over keys: what is added up, and what a key's score then gets as gradient.

A block of weights comes in with its logarithms, and is written over, because fresh memory costs page faults. A pair
that is not seen has weight 0 and the least finite number as logarithm or score, in both models, and so adds 0 to
everything; so does a row that sees nothing, where both models have equal weights. The formulas are derived in
`headway.kernels.map_distillation`; `headway.kernels.maps.reference` says the same in plain lines.

Shapes: blocks are [B, H, Q, K], B batch, H heads, Q queries, K keys; sums over keys are [B, H, Q].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """A block of weights.

    Attributes:
        log: their logarithms; the scores, where those are compared; memory that is free, where only weights are.
        p: the weights, in memory of their own; anything where scores are compared.
    """

    log: Tensor
    p: Tensor


State = tuple[Tensor, ...]
"""Blocks that hold what the gradient needs."""


@dataclass(frozen=True)
class Divergence:
    """A loss of rows.

    Attributes:
        terms: (teacher, student) -> sum of f(p, q), the centre (sum of q df/dq / `factor`; None if the gradient needs
            none), and a state.
        slope: (state, centre over all keys) -> gradient by the scores / `factor`, in memory of the state.
        factor: what it takes one pass less over a block to multiply by later.
        mean: whether loss and gradient are divided by the number of keys that the row sees.
        compares: what `terms` looks at.
    """

    terms: Callable[[Weights, Weights], tuple[Tensor, Tensor | None, State]]
    slope: Callable[[State, Tensor | None], Tensor]
    factor: float = 1.0
    mean: bool = False
    compares: Literal["logs and weights", "weights", "scores"] = "logs and weights"


def _kl(teacher: Weights, student: Weights) -> tuple[Tensor, None, State]:
    (log_p, p), (log_q, q) = teacher, student
    return log_p.sub_(log_q).mul_(p).sum(-1), None, (q.sub_(p),)


def _reverse_kl(teacher: Weights, student: Weights) -> tuple[Tensor, Tensor, State]:
    (log_p, _), (log_q, q) = teacher, student
    pull = log_q.sub_(log_p).mul_(q)
    centre = pull.sum(-1)
    return centre, centre, (pull, q)


def _js(teacher: Weights, student: Weights) -> tuple[Tensor, Tensor, State]:
    (free, p), (also_free, q) = teacher, student
    least = torch.finfo(p.dtype).tiny  # of what is divided by, and of what has a logarithm: 0 log 0 is 0
    m = torch.add(p, q, out=free).mul_(0.5).clamp_(min=least)
    pull = torch.div(q, m, out=also_free).clamp_(min=least).log_().mul_(q)
    centre = pull.sum(-1)
    theirs = torch.div(p, m, out=m).clamp_(min=least).log_().mul_(p)
    return theirs.sum(-1).add_(centre).mul_(0.5), centre, (pull, q)


def _mse(teacher: Weights, student: Weights) -> tuple[Tensor, Tensor, State]:
    p, q = teacher.p, student.p
    apart = torch.sub(q, p, out=p)
    value = torch.linalg.vector_norm(apart, dim=-1).square_()
    pull = apart.mul_(q)
    return value, pull.sum(-1), (pull, q)


def _scores(teacher: Weights, student: Weights) -> tuple[Tensor, None, State]:
    apart = student.log.sub_(teacher.log)
    return torch.linalg.vector_norm(apart, dim=-1).square_(), None, (apart,)


def _plain(state: State, centre: Tensor | None) -> Tensor:
    return state[0]


def _centred(state: State, centre: Tensor | None) -> Tensor:
    pull, q = state
    assert centre is not None
    return pull.addcmul_(q, centre.unsqueeze(-1), value=-1)


DIVERGENCES = {
    "kl": Divergence(_kl, _plain),
    "reverse_kl": Divergence(_reverse_kl, _centred),
    "js": Divergence(_js, _centred, 0.5, compares="weights"),
    "mse": Divergence(_mse, _centred, 2.0, mean=True, compares="weights"),
    "scores": Divergence(_scores, _plain, 2.0, mean=True, compares="scores"),
}
