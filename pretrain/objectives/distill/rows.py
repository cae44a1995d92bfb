"""Contrast of attention rows: which of a head's rows of the teacher is this row of the student's?

Row i of the student's map is compared with rows j of the teacher's by the cosine of their weights, where they look at
the same keys; the loss is the cross-entropy of i = j among them (InfoNCE, van den Oord et al. 2018, as CoDIR has it
for representations). So many rows are taken, evenly spaced, that memory grows with the sequence: 2 x count x S a
head.

Shapes: B batch, H heads, S keys, Q rows, D head dimension, R distances.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.slopes import Distances, Fixed, block_of
from headway.pretrain.models.attention import Shown


def row_contrast(
    shown: Shown, q_BHSD: Tensor, k_BHSD: Tensor, bias_HR: Tensor | None, count: int, temperature: float
) -> Tensor:
    """Sum over the rows that are taken and count, a mean over the student's heads, scaled as if all rows had been:
    [B].

    Args:
        shown: of the student.
        q_BHSD, k_BHSD: the teacher's; its heads are a multiple of the student's, whose maps are then averaged.
        bias_HR: of its scores, by distance.
        count: of rows.
        temperature: of cosines.
    """
    length = shown.q_BHSD.shape[2]
    taken = torch.arange(min(count, length), device=q_BHSD.device) * length // min(count, length)
    given = None if bias_HR is None else Distances.whole(bias_HR, length)
    factor = q_BHSD.shape[-1] ** -0.5
    with torch.no_grad():
        theirs = rows_of(q_BHSD, k_BHSD, shown.mask, factor, given, taken)
        theirs = theirs.unflatten(1, (shown.q_BHSD.shape[1], -1)).mean(2)
    ours = rows_of(shown.q_BHSD, shown.k_BKMD, shown.mask, shown.scale, shown.bias_HSM, taken)
    similar = F.normalize(ours, dim=-1) @ F.normalize(theirs, dim=-1).mT / temperature
    counted_BQ = counting(shown.mask, taken, len(ours))
    similar = similar.masked_fill(~counted_BQ[:, None, None], torch.finfo(similar.dtype).min)
    each_BQ = -torch.log_softmax(similar, -1).diagonal(dim1=-2, dim2=-1).mean(1)
    sums_B = torch.where(counted_BQ, each_BQ, 0).sum(1)
    whole_B = counting(shown.mask, torch.arange(length, device=taken.device), len(ours)).sum(1)
    return sums_B * whole_B / counted_BQ.sum(1).clamp(min=1)  # in their dtype: a ratio of integers is fp32


def rows_of(
    q_BHSD: Tensor, k_BKSD: Tensor, mask: Mask, scale: float, bias: Fixed | None, taken_Q: Tensor
) -> Tensor:
    """Weights of some rows [B, H, Q, S], 0 where nothing is seen."""
    q_BHQD, k_BHSD = q_BHSD[:, :, taken_Q], per_query_head(k_BKSD, q_BHSD)
    scores = (q_BHQD @ k_BHSD.mT).to(torch.promote_types(q_BHSD.dtype, torch.float32)) * scale
    if bias is not None:
        scores = scores + block_of(bias, taken_Q)
    seen = lower(mask, q_BHSD.shape[2], k_BHSD.shape[2], scores.device, taken_Q)
    if seen is None:
        return scores.softmax(-1)
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.where(seen, weights, 0)


def counting(mask: Mask, taken_Q: Tensor, batch: int) -> Tensor:
    """Which rows are no padding, bool [B, Q]."""
    if mask.documents is None:
        return torch.ones(batch, len(taken_Q), dtype=torch.bool, device=taken_Q.device)
    return mask.documents[:, taken_Q] >= 0
