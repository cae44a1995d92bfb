"""What a classifier learns from a teacher's logits (Hinton et al. 2015; Touvron et al. 2021, section 4).

Shapes: B batch, Y classes.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["forward", "reverse", "js"]


class SoftClasses(NamedTuple):
    """How to learn from a teacher's logits.

    Attributes:
        hard: the teacher's likeliest class is a second label (DeiT, equation 3); else its distribution is matched.
        temperature: of both distributions, tau (DeiT, equation 2); not of hard labels.
        weight: of the teacher's part in the loss.
        task: of the labels' part.
        divergence: of the student's distribution q from the teacher's p: `forward` KL(p || q), `reverse` KL(q || p),
            `js` (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2.
    """

    hard: bool = True
    temperature: float = 1.0
    weight: float = 0.5
    divergence: Divergence = "forward"
    task: float = 0.5

    def loss(self, logits_BY: Tensor, teacher_BY: Tensor) -> Tensor:
        """The teacher's part [B], in nats: cross-entropy, or tau^2 times the divergence, so that gradients keep their
        size as tau grows (Hinton et al. 2015, section 2).

        Args:
            logits_BY: the student's.
            teacher_BY: the teacher's, without gradient.

        Raises:
            ValueError: the teacher tells other classes apart.
        """
        if teacher_BY.shape != logits_BY.shape:
            sizes = f"{list(teacher_BY.shape)}, the student's {list(logits_BY.shape)}"
            raise ValueError(f"teacher_logits have shape {sizes}: both must tell the same classes apart")
        if self.hard:
            return F.cross_entropy(logits_BY, teacher_BY.argmax(1), reduction="none")
        t = self.temperature
        log_p, log_q = (x.to(logits_BY.dtype).div(t).log_softmax(1) for x in (teacher_BY, logits_BY))
        return t * t * divergence(log_p, log_q, self.divergence)


def divergence(log_p_BY: Tensor, log_q_BY: Tensor, kind: Divergence) -> Tensor:
    """[B]; see `SoftClasses`."""
    if kind == "forward":
        return _kl(log_p_BY, log_q_BY)
    if kind == "reverse":
        return _kl(log_q_BY, log_p_BY)
    log_m_BY = torch.logaddexp(log_p_BY, log_q_BY) - math.log(2)
    return (_kl(log_p_BY, log_m_BY) + _kl(log_q_BY, log_m_BY)) / 2


def _kl(log_p_BY: Tensor, log_q_BY: Tensor) -> Tensor:
    """KL(p || q), [B]."""
    return (log_p_BY.exp() * (log_p_BY - log_q_BY)).sum(1)
