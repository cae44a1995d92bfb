"""Soft targets: a student's logits drawn towards a teacher's distribution (Hinton et al. 2015, section 2).

At temperature τ a teacher says p = softmax(z_teacher / τ), a student q = softmax(z / τ). The loss is τ² D, whose
gradient keeps its size at any τ, and D a divergence:

    forward   KL(p || q), which Hinton et al. take
    reverse   KL(q || p), of Gu et al. 2024 (MiniLLM)
    js        KL(p || m) / 2 + KL(q || m) / 2, m = (p + q) / 2 (Lin 1991), at most ln 2

With g = dD/dq, up to a constant, the gradient by a logit is τ² dD/dz = τ q (g - sum q g).

Shapes: N rows (tokens), V vocabulary (of this rank), E hidden size of the student, T of the teacher, k words of the
teacher that are kept, O outcomes: V words, or k words and "any other".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.fused import fused
from headway.kernels.precision import product_dtype

DIVERGENCES = ("forward", "reverse", "js")


class Soft(NamedTuple):
    """How a teacher's word counts.

    Attributes:
        temperature: τ, above 0.
        divergence: one of DIVERGENCES.
        weight: of τ² D.
        task: weight of what the loss is without a teacher.
    """

    temperature: float = 1.0
    divergence: str = "forward"
    weight: float = 1.0
    task: float = 1.0


class FullTeacher(NamedTuple):
    """A teacher by its last hidden states and its head; its logits exist for a chunk of rows only.

    Products are in autocast's dtype where it is on, else in the hidden states'. Nothing gets a gradient.
    """

    hidden_NT: Tensor
    weight_VT: Tensor
    bias_V: Tensor | None = None


class TopTeacher(NamedTuple):
    """A teacher by the logits of its k likeliest words and the log-sum-exp of all its logits / τ.

    All other words are one outcome, so that their mass is matched as a whole; with k = V it is the full teacher.

    Attributes:
        values_Nk: logits, not divided by τ, any dtype.
        indices_Nk: the words' ids in the whole vocabulary, no id twice in a row; any integers.
        lse_N: at the temperature of the loss. Best in fp32: in fewer bits p sums to one only up to their rounding.
    """

    values_Nk: Tensor
    indices_Nk: Tensor
    lse_N: Tensor


Teacher = FullTeacher | TopTeacher
Total = Callable[[Tensor, str], Tensor]
SoftRowLoss = Callable[..., tuple[Tensor, Tensor, Tensor | None]]


def alone(x: Tensor, op: str) -> Tensor:
    """The sum (`max`) over ranks where there is one."""
    return x


def soft_row_loss(
    logits_NV: Tensor,
    teacher: Tensor | TopTeacher,
    valid_N: Tensor,
    soft: Soft,
    gradients: bool,
    total: Total = alone,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of τ² D over rows, that of every row [N], and with `gradients` the gradient of weight x sum, [N, V].

    In fp32, in fp64 for fp64 logits; logits are left as they are. By Triton's kernels, on GPUs, the gradient has the
    dtype of the teacher's logits and takes their place, or that of the student's where the teacher is k words.

    Where the k words have all of a teacher's mass, "any other" is given the dtype's epsilon, below which 1 - sum p has
    no digit that holds: the reverse divergence is then large instead of infinite.

    Args:
        teacher: its logits [N, V], or these rows of its k words.
        valid_N: bool; other rows count as 0.
        total: (x, "sum" or "max") -> that over all ranks, where each has some words.
        first: words [first, first + V) are this rank's.
    """
    said = teacher.values_Nk if isinstance(teacher, TopTeacher) else teacher
    if fused(logits_NV, said):
        from headway.kernels.triton import soft_targets as fast

        return fast.soft_row_loss(logits_NV, teacher, valid_N, soft, gradients, total, first)
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    scaled_NV = logits_NV.to(dtype) / soft.temperature
    scale_N1 = valid_N.unsqueeze(1).to(dtype) * (soft.temperature * soft.weight)
    if isinstance(teacher, TopTeacher):
        each, gradient = _over_top(scaled_NV, teacher, scale_N1, soft, gradients, total, first)
    else:
        teacher_NV = teacher.to(dtype) / soft.temperature
        lse_N2 = _log_sum(torch.stack([scaled_NV.logsumexp(1), teacher_NV.logsumexp(1)], 1), total)
        log_q, log_p = scaled_NV.sub_(lse_N2[:, :1]), teacher_NV.sub_(lse_N2[:, 1:])
        each, gradient = _divergence(log_p, log_q, scale_N1, soft.divergence, gradients, total)
    each = torch.where(valid_N, each * soft.temperature**2, 0)
    return each.sum(), each, gradient


def _over_top(scaled_NV, teacher, scale_N1, soft, gradients, total, first):
    """D of every row, over the k words and any other, and the gradient by all words' logits. Overwrites the logits."""
    here_Nk = teacher.indices_Nk.long() - first
    mine_Nk = (here_Nk >= 0) & (here_Nk < scaled_NV.shape[1])
    here_Nk = torch.where(mine_Nk, here_Nk, 0)
    top_Nk = torch.where(mine_Nk, scaled_NV.gather(1, here_Nk), -math.inf)
    scaled_NV.scatter_add_(1, here_Nk, torch.where(mine_Nk, -math.inf, torch.zeros_like(top_Nk)))
    own_NO = torch.cat([top_Nk, scaled_NV.logsumexp(1, keepdim=True)], 1)
    each, slope_NO, rest_N1 = over_outcomes(own_NO, teacher, scale_N1, soft, gradients, total)
    if slope_NO is None:
        return each, None
    # Other words share the slope of their sum as they share its mass; those taken out have exp(-inf) = 0.
    gradient = scaled_NV.sub_(rest_N1).exp_().mul_(slope_NO[:, -1:])
    return each, gradient.scatter_add_(1, here_Nk, torch.where(mine_Nk, slope_NO[:, :-1], 0))


def over_outcomes(
    own_NO: Tensor, teacher: TopTeacher, scale_N1: Tensor, soft: Soft, gradients: bool, total: Total
) -> tuple[Tensor, Tensor | None, Tensor]:
    """D of every row [N], over the k words and any other; with `gradients` scale x its slope by the student's outcomes
    [N, O], unnormalized logarithms; and of these that of any other [N, 1].

    `total` is asked twice, for the student's logits of the k words and its mass elsewhere: then every rank has all
    outcomes.

    Args:
        own_NO: this rank's logits / τ of the k words, -inf of words that others have, and its others' log-sum-exp.
    """
    dtype = own_NO.dtype
    lowest, epsilon = torch.finfo(dtype).min, torch.finfo(dtype).eps
    most_NO = total(own_NO, "max")
    most_N1 = most_NO[:, -1:].clamp(min=lowest)  # finite where there is no other word
    # From own_NO, not from the part: Inductor of PyTorch 2.13 lets the all-reduce overwrite parts of what it gets.
    rest_N1 = (most_N1 + total((own_NO[:, -1:] - most_N1).exp(), "sum").log()).clamp(min=lowest)
    outcomes_NO = torch.cat([most_NO[:, :-1], rest_N1], 1)
    log_q_NO = outcomes_NO - outcomes_NO.logsumexp(1, keepdim=True)

    log_p_Nk = teacher.values_Nk.to(dtype) / soft.temperature - teacher.lse_N.to(dtype).unsqueeze(1)
    tail_N1 = torch.log1p(-log_p_Nk.exp().sum(1, keepdim=True).clamp(max=1 - epsilon))
    log_p_NO = torch.cat([log_p_Nk, tail_N1], 1)
    nothing_else = torch.cat([torch.zeros_like(log_p_Nk, dtype=torch.bool), rest_N1 == lowest], 1)
    log_q_NO = torch.where(nothing_else, log_p_NO, log_q_NO)

    each, slope_NO = _divergence(log_p_NO, log_q_NO, scale_N1, soft.divergence, gradients, alone)
    return each, slope_NO, rest_N1


def _log_sum(own: Tensor, total: Total) -> Tensor:
    """Log-sum-exp over ranks, of each one's own: the same where there is one rank."""
    most = total(own, "max")
    return most + total((own - most).exp(), "sum").log()


def _divergence(log_p, log_q, scale_N1, divergence, gradients, total):
    """D of every row [N], and scale x q (g - sum q g) [N, O]; `total` adds up what ranks' outcomes give."""
    q = log_q.exp()
    if divergence == "forward":  # q g = -p
        p = log_p.exp()
        terms, pull = (log_p - log_q).mul_(p), p.neg_()
    elif divergence == "reverse":  # g = log q / p
        terms = pull = (log_q - log_p).mul_(q)
    else:  # g = log(q / m) / 2
        log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
        pull = (log_q - log_m).mul_(q / 2)
        terms = (log_p - log_m).mul_(log_p.exp() / 2).add_(pull)
    each_N, mean_N = total(torch.stack([terms.sum(1), pull.sum(1)], 1), "sum").unbind(1)
    return each_N, pull.addcmul_(q, mean_N.unsqueeze(1), value=-1).mul_(scale_N1) if gradients else None


class Lesson(NamedTuple):
    """A teacher for all rows of a call, and how it is listened to."""

    soft: Soft
    teacher: Teacher
    compute: SoftRowLoss

    def check(self, rows: int, words: int) -> None:
        """
        Raises:
            ValueError: what was asked cannot be computed.
        """
        if self.soft.divergence not in DIVERGENCES:
            raise ValueError(f"divergence {self.soft.divergence!r}: must be one of {', '.join(DIVERGENCES)}")
        if not self.soft.temperature > 0:
            raise ValueError(f"temperature {self.soft.temperature}: must be above 0")
        if len(self.teacher[0]) != rows:
            raise ValueError(f"teacher of {len(self.teacher[0])} rows: the student has {rows}")
        if isinstance(self.teacher, FullTeacher) and len(self.teacher.weight_VT) != words:
            raise ValueError(f"teacher of {len(self.teacher.weight_VT)} words: the student has {words}")

    def narrowed(self) -> Lesson:
        """With a teacher's head in the dtype of products, once for all chunks."""
        if isinstance(self.teacher, TopTeacher):
            return self
        x, weight, bias = self.teacher
        narrow = product_dtype(x)
        narrow_bias = None if bias is None else bias.to(narrow)
        return self._replace(teacher=FullTeacher(x.to(narrow), weight.to(narrow), narrow_bias))

    def buffer(self, rows: int) -> Tensor | None:
        """Memory for a full teacher's logits, for all chunks."""
        if isinstance(self.teacher, TopTeacher):
            return None
        return self.teacher.weight_VT.new_empty(rows, len(self.teacher.weight_VT))

    def heard(
        self, logits_nV: Tensor, valid_n: Tensor, start: int, buffer: Tensor | None, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`soft_row_loss` of rows from `start` on."""
        part = slice(start, start + len(logits_nV))
        if isinstance(self.teacher, TopTeacher):
            said: Tensor | TopTeacher = TopTeacher(*(x[part] for x in self.teacher))
        else:
            assert buffer is not None
            x, weight, bias = self.teacher
            said = torch.mm(x[part], weight.T, out=buffer[: len(logits_nV)])
            if bias is not None:
                said += bias
        return self.compute(logits_nV, said, valid_n, self.soft, gradients)

    def mix(self, slope_nV: Tensor, each_n: Tensor, soft_n: Tensor, gradient_nV: Tensor | None) -> None:
        """Add the teacher's part to gradients and losses of rows, in place."""
        each_n.mul_(self.soft.task).add_(soft_n, alpha=self.soft.weight)
        if gradient_nV is not None:
            if self.soft.task:  # else there are still logits, not gradients
                gradient_nV.add_(slope_nV, alpha=self.soft.task)
            slope_nV.copy_(gradient_nV)
