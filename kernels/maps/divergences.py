"""Losses of a row of weights, as sums over keys: what is added up, and what a key's score then gets as gradient.

Blocks of log-weights come in, log p of the teacher and log q of the student (of `scores`: the scores themselves), and
are written over, because fresh memory costs page faults. A pair that is not seen has the least finite number in both,
and so adds 0 to everything. The formulas are derived in `headway.kernels.map_distillation`, and
`headway.kernels.maps.reference` says the same in plain lines.

Shapes: blocks are [B, H, Q, K], B batch, H heads, Q queries, K keys; sums over keys are [B, H, Q].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Spare = Callable[[int], Tensor]
"""Number -> a block's memory of any content, other memory for every number."""

State = tuple[Tensor, ...]
"""Blocks that hold what the gradient needs."""


@dataclass(frozen=True)
class Divergence:
    """A loss of rows.

    Attributes:
        terms: (log p, log q, spare) -> sum of f(p, q), the centre (sum of q df/dq; None if the gradient needs none),
            and a state.
        slope: (state, centre over all keys) -> gradient by the scores, in memory of the state.
        mean: whether loss and gradient are divided by the number of keys that the row sees.
        of_weights: whether weights are compared, and not scores.
    """

    terms: Callable[[Tensor, Tensor, Spare], tuple[Tensor, Tensor | None, State]]
    slope: Callable[[State, Tensor | None], Tensor]
    mean: bool = False
    of_weights: bool = True


def _kl(log_p: Tensor, log_q: Tensor, spare: Spare) -> tuple[Tensor, None, State]:
    p = torch.exp(log_p, out=spare(0))
    value = log_p.sub_(log_q).mul_(p).sum(-1)
    slope = log_q.exp_().sub_(p)
    # sum q - sum p is 0, but for what rounding of the log-sum-exps did; that cancels here, to first order.
    return value.add_(slope.sum(-1)), None, (slope,)


def _reverse_kl(log_p: Tensor, log_q: Tensor, spare: Spare) -> tuple[Tensor, Tensor, State]:
    q = torch.exp(log_q, out=spare(0))
    pull = log_q.sub_(log_p).mul_(q)
    centre = pull.sum(-1)
    return centre + log_p.exp_().sub_(q).sum(-1), centre, (pull, q)  # see `_kl`


def _js(log_p: Tensor, log_q: Tensor, spare: Spare) -> tuple[Tensor, Tensor, State]:
    p, q = torch.exp(log_p, out=spare(0)), torch.exp(log_q, out=spare(1))
    least = torch.finfo(p.dtype).tiny  # where both weights are 0 their mean's logarithm must be finite
    log_m = torch.add(p, q, out=spare(2)).mul_(0.5).clamp_(min=least).log_()
    pull = log_q.sub_(log_m).mul_(q).mul_(0.5)
    centre = pull.sum(-1)
    return log_p.sub_(log_m).mul_(p).sum(-1).mul_(0.5).add_(centre), centre, (pull, q)


def _mse(log_p: Tensor, log_q: Tensor, spare: Spare) -> tuple[Tensor, Tensor, State]:
    p, q = log_p.exp_(), log_q.exp_()
    apart = torch.sub(q, p, out=p)
    value = torch.linalg.vector_norm(apart, dim=-1).square_()
    pull = apart.mul_(q).mul_(2)
    return value, pull.sum(-1), (pull, q)


def _scores(t: Tensor, s: Tensor, spare: Spare) -> tuple[Tensor, None, State]:
    apart = s.sub_(t)
    return torch.linalg.vector_norm(apart, dim=-1).square_(), None, (apart,)


def _centred(state: State, centre: Tensor | None) -> Tensor:
    pull, q = state
    assert centre is not None
    return pull.addcmul_(q, centre.unsqueeze(-1), value=-1)


DIVERGENCES = {
    "kl": Divergence(_kl, lambda state, _: state[0]),
    "reverse_kl": Divergence(_reverse_kl, _centred),
    "js": Divergence(_js, _centred),
    "mse": Divergence(_mse, _centred, mean=True),
    "scores": Divergence(_scores, lambda state, _: state[0].mul_(2), mean=True, of_weights=False),
}
