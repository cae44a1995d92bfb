"""Distillation of attention maps where keys come in parts, as they do when they go round a ring of ranks.

What belongs to rows is added up over parts of the keys: first `log_sums` (merged by logaddexp) and, where the loss is a
mean, `seen_keys` (added); then `part_terms` (added); and at last `part_gradients`, whose dq is added, and whose dk and
d_bias belong to the part's keys. The loss of a row is its value over parts, divided by the number of its keys if
`DIVERGENCES[loss].mean`; what comes in from above must be divided by it too.

Shapes: B batch, H student heads, G teacher heads for each, K key heads, Q queries, S keys of the part, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.maps.divergences import DIVERGENCES
from headway.kernels.maps.gradients import Gradients, Wanted
from headway.kernels.maps.operands import Scores, Seen
from headway.kernels.maps.pair import STUDENT, Pair, block_scores
from headway.kernels.maps.walk import walk


@torch.no_grad()
def log_sums(scores: Scores, seen: Seen) -> Tensor:
    """Log-sum-exp of a model's scores over the part's keys, [B, H, Q], fp32 or wider.

    A row that sees none of them has the least finite number, which logaddexp takes for nothing.
    """
    pair = Pair.of(scores, scores)
    out = scores.q.new_empty(scores.q.shape[:3], dtype=pair.wide)
    for block in walk(pair.student, seen):
        found = block_scores(pair.student, block, pair.memory, STUDENT, pair.wide)
        block.rows(out).copy_(torch.logsumexp(found, -1))
    return out


def seen_keys(scores: Scores, seen: Seen) -> Tensor:
    """How many of the part's keys a row sees, int64 [B, 1, Q]."""
    batch, _, queries, _ = scores.q.shape
    out = torch.empty(batch, 1, queries, dtype=torch.int64, device=scores.q.device)
    for block in walk(scores, seen):
        out[block.samples, :, block.queries] = block.counts(out.device)
    return out


@torch.no_grad()
def part_terms(
    teacher: Scores, student: Scores, loss: str, seen: Seen, lse_teacher: Tensor, lse_student: Tensor
) -> tuple[Tensor, Tensor]:
    """A row's loss and its centre, as `part_gradients` takes it, from the part's keys: both [B, H, Q], fp32 or wider.

    Args:
        teacher, student: see `operands.Sums`; of the part's keys.
        loss: a word of `DIVERGENCES`.
        seen: of the part's keys.
        lse_teacher, lse_student: of all keys, [B, G H, Q] and [B, H, Q]; `scores` does not look at them.
    """
    pair, divergence = Pair.of(teacher, student), DIVERGENCES[loss]
    value, centre = (student.q.new_zeros(student.q.shape[:3], dtype=pair.wide) for _ in range(2))
    for block in walk(pair.student, seen):
        weights = pair.weights(block, divergence, (lse_teacher, lse_student))
        some, middle, _ = divergence.terms(*weights)
        block.rows(value).copy_(some)
        if middle is not None:
            block.rows(centre).copy_(middle)
    return value, centre


@torch.no_grad()
def part_gradients(
    teacher: Scores,
    student: Scores,
    loss: str,
    seen: Seen,
    lse_teacher: Tensor,
    lse_student: Tensor,
    centre: Tensor,
    upstream: Tensor,
    wanted: Wanted = Wanted(True, True, False),
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients from the part's keys: dq [B, H, Q, D], dk [B, K, S, D], d_bias [H, Q, S], fp32 or wider.

    Args:
        centre: over all keys, [B, H, Q].
        upstream: gradient by the rows' values, [B, H, Q]; 0 of rows that do not count.
        wanted: which gradients are; the others are None.
        teacher, student, loss, seen, lse_teacher, lse_student: see `part_terms`.
    """
    pair, divergence = Pair.of(teacher, student), DIVERGENCES[loss]
    gradients = Gradients(pair, wanted)
    for block in walk(pair.student, seen):
        weights = pair.weights(block, divergence, (lse_teacher, lse_student))
        _, _, state = divergence.terms(*weights)
        gradients.add(block, divergence.slope(state, block.rows(centre)), block.rows(upstream))
    return gradients.total(divergence.factor)
