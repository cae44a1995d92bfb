"""Cross-entropy and soft targets where each rank has the logits of some words: the logits of all are never gathered.

Shapes: N rows (tokens), V words of this rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE, RowLoss
from headway.kernels.fused import fused
from headway.kernels.soft_targets import Soft, SoftRowLoss, TopTeacher, soft_row_loss
from headway.parallel.tensor.collectives import total


def row_loss_over(first: int, vocabulary: int, group: str) -> RowLoss:
    """`kernels.cross_entropy.row_loss` for words [first, first + V) of `vocabulary`; sums are equal on all ranks.

    Three reductions of numbers a row: the largest logit, then sums, and with `accuracy` the place of the largest.
    """

    def over_ranks(x: Tensor, op: str) -> Tensor:
        return total(x, group, op)

    def compute(
        logits_NV: Tensor,
        labels_N: Tensor,
        z_loss: float,
        gradients: bool,
        smoothing: float = 0.0,
        accuracy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if fused(logits_NV):
            from headway.kernels.triton import cross_entropy as fast

            each = fast.row_loss_over(first, vocabulary, over_ranks)
            return each(logits_NV, labels_N, z_loss, gradients, smoothing, accuracy)
        wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
        valid = (labels_N != IGNORE).unsqueeze(1)
        here = labels_N.unsqueeze(1) - first
        mine = (here >= 0) & (here < wide.shape[1]) & valid
        target = torch.where(mine, here, 0)
        own_top = wide.amax(1, keepdim=True)
        top = total(own_top, group, "max")
        powers = (wide - top).exp_()
        parts = [
            powers.sum(1, keepdim=True),
            torch.where(mine, wide.gather(1, target), 0),
            *([wide.sum(1, keepdim=True)] if smoothing else []),
        ]
        exponentials, picked, *every = total(torch.cat(parts, 1), group).split(1, 1)
        lse = exponentials.log() + top
        chosen = picked - lse
        if smoothing:
            chosen = (1 - smoothing) * chosen + smoothing * (every[0] / vocabulary - lse)
        each_nll, each_z = torch.where(valid, chosen, 0), torch.where(valid, lse.square(), 0)
        nll, z = -each_nll.sum(), each_z.sum() * z_loss
        correct = valid.new_zeros(())
        if accuracy:
            place = torch.where(own_top == top, wide.argmax(1, keepdim=True) + first, vocabulary)
            correct = ((total(place, group, "min") == labels_N.unsqueeze(1)) & valid).sum()
        if gradients:
            slope = torch.where(valid, 1 + 2 * z_loss * lse, 0)
            gradient = powers.mul_(slope / exponentials)
            if smoothing:
                gradient = gradient - valid.to(wide.dtype) * (smoothing / vocabulary)
            gradient.scatter_add_(1, target, (smoothing - 1) * mine.to(wide.dtype))
            logits_NV.copy_(gradient)
        return nll, z, correct.to(wide.dtype), (each_z * z_loss - each_nll).squeeze(1)

    return compute


def soft_row_loss_over(first: int, group: str) -> SoftRowLoss:
    """`kernels.soft_targets.soft_row_loss` for words from `first` on; sums are equal on all ranks.

    A teacher's head has the same words here, its k likeliest words are alike on all ranks. Three reductions of two
    numbers a row, or two, of k + 1 numbers and of one.
    """

    def compute(
        logits_NV: Tensor, teacher: Tensor | TopTeacher, valid_N: Tensor, soft: Soft, gradients: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        def over_ranks(x: Tensor, op: str) -> Tensor:
            return total(x, group, op)

        return soft_row_loss(logits_NV, teacher, valid_N, soft, gradients, over_ranks, first)

    return compute
