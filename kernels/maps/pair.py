"""Teacher and student, of which blocks of scores and weights are computed.

Shapes: B batch, H student heads, G teacher heads for each, Q queries, K keys of a block, S keys, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.slopes import Fixed, block_of
from headway.kernels.maps.divergences import Divergence, Weights
from headway.kernels.maps.operands import Scores
from headway.kernels.maps.walk import Block, Memory

TEACHER, STUDENT, SPARE, TEACHER_WEIGHTS, STUDENT_WEIGHTS, SPARE_WEIGHTS = range(6)
"""Numbers of memory."""


@dataclass(frozen=True)
class Pair:
    """Both models, laid out for products of blocks.

    Attributes:
        teachers: G of them: the g-th has the heads g, G + g, 2 G + g ..., which are compared with heads 0, 1, 2 ...
        student: as many heads of keys as of queries.
        key_heads: the student's, before they were repeated.
        wide: of scores and sums.
        memory: for blocks.
    """

    teachers: tuple[Scores, ...]
    student: Scores
    key_heads: int
    wide: torch.dtype
    memory: Memory

    @classmethod
    def of(cls, teacher: Scores, student: Scores) -> Pair:
        group = teacher.q.shape[1] // student.q.shape[1]
        wide = torch.promote_types(torch.promote_types(teacher.q.dtype, student.q.dtype), torch.float32)
        every = _laid_out(teacher)
        teachers = tuple(
            Scores(every.q[:, g::group].contiguous(), every.k[:, g::group].contiguous(), every.scale,
                   _every(every.bias, g, group))
            for g in range(group)
        )  # fmt: skip
        return cls(teachers, _laid_out(student), student.k.shape[1], wide, Memory(student.q.device))

    def weights(
        self, block: Block, divergence: Divergence, sums: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Weights, Weights]:
        """What is compared of teacher and student, [B, H, Q, K].

        `sums`: log-sum-exps of both, [B, G H, Q] and [B, H, Q], where the keys here are not all.
        """
        lse_teacher, lse_student = (None, None) if sums is None else sums
        each = self._each_teacher(block, divergence, lse_teacher)
        log, p = next(each)
        for more in each:
            if divergence.compares == "scores":
                log += more.log
            else:
                p += more.p
            if divergence.compares == "logs and weights":
                torch.logaddexp(log, more.log, out=log)
        count = len(self.teachers)
        if count > 1 and divergence.compares == "scores":
            hide_(log.div_(count), block)
        elif count > 1:
            log -= math.log(count)
            p /= count
        numbers = STUDENT, STUDENT_WEIGHTS
        return Weights(log, p), self._weights(self.student, block, divergence, lse_student, numbers)

    def _each_teacher(self, block: Block, divergence: Divergence, lse: Tensor | None) -> Iterator[Weights]:
        for g, scores in enumerate(self.teachers):
            theirs = None if lse is None else lse[:, g :: len(self.teachers)]
            numbers = (SPARE, SPARE_WEIGHTS) if g else (TEACHER, TEACHER_WEIGHTS)
            yield self._weights(scores, block, divergence, theirs, numbers)

    def _weights(
        self,
        scores: Scores,
        block: Block,
        divergence: Divergence,
        lse: Tensor | None,
        numbers: tuple[int, int],
    ) -> Weights:
        """Scores, or their softmax and its logarithm; `lse` is the log-sum-exp over all keys."""
        log = block_scores(scores, block, self.memory, numbers[0], self.wide)
        if divergence.compares == "scores":
            return Weights(log, log)
        p = self.memory.of(numbers[1], block.shape, self.wide)
        if lse is not None:
            log -= block.rows(lse).unsqueeze(-1)
            # A power of 2, because PyTorch's exp of what is not seen takes 40 times as long on CPU.
            return Weights(log, torch.mul(log, 1 / math.log(2), out=p).exp2_())
        torch.softmax(log, -1, out=p)
        if divergence.compares != "weights":  # the greatest score and weight tell the log-sum-exp
            log -= log.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()
        return Weights(log, p)


def block_scores(scores: Scores, block: Block, memory: Memory, number: int, wide: torch.dtype) -> Tensor:
    """A block of scores; the least finite number where a row does not see."""
    q, k = block.flat(scores.q, block.queries), block.flat(scores.k, block.keys)
    out = memory.of(number, block.shape, wide)
    flat = out.flatten(0, 1)
    if q.dtype == wide:
        torch.baddbmm(flat, q, k.mT, beta=0, alpha=scores.scale, out=flat)
    else:
        narrow = memory.of(number, tuple(flat.shape), q.dtype)
        flat.copy_(torch.bmm(q, k.mT, out=narrow)).mul_(scores.scale)
    if scores.bias is not None:
        out += block_of(_heads(scores.bias, block.heads), block.queries, block.keys)
    return hide_(out, block)


def hide_(scores: Tensor, block: Block) -> Tensor:
    """The least finite number where a row does not see."""
    if block.hidden is not None:
        scores[..., block.sure :].masked_fill_(block.hidden, torch.finfo(scores.dtype).min)
    return scores


def _laid_out(scores: Scores) -> Scores:
    k = per_query_head(scores.k.detach(), scores.q)
    bias = scores.bias.detach() if isinstance(scores.bias, Tensor) else scores.bias
    return Scores(scores.q.detach().contiguous(), k.contiguous(), scores.scale, bias)


def _every(bias: Fixed | None, first: int, step: int) -> Fixed | None:
    """Of some heads."""
    if bias is None:
        return None
    return bias[first::step] if isinstance(bias, Tensor) else bias.every(first, step)


def _heads(bias: Fixed, heads: slice) -> Fixed:
    return bias[heads] if isinstance(bias, Tensor) else bias.of_heads(heads.start, heads.stop - heads.start)
