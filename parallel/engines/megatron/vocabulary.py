"""Megatron-Core's cross-entropy over words that are cut over the tensor axis.

Shapes: N rows (tokens), V words of this rank, W those of the first rank, which are the most.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE, RowLoss


def row_loss_by_megatron(most: int, ours: RowLoss) -> RowLoss:
    """`kernels.cross_entropy.row_loss` by `vocab_parallel_cross_entropy`.

    Megatron takes it that all ranks have W words, so logits of words that there are not are added, of -inf.

    Args:
        most: W.
        ours: computes what Megatron lacks or does another way: the z-loss, smoothing, accuracy.
    """

    def compute(
        logits_NV: Tensor,
        labels_N: Tensor,
        z_loss: float,
        gradients: bool,
        smoothing: float = 0.0,
        accuracy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if z_loss or smoothing or accuracy:
            return ours(logits_NV, labels_N, z_loss, gradients, smoothing, accuracy)
        words = logits_NV.shape[1]
        logits_NW = F.pad(logits_NV.float(), (0, most - words), value=-math.inf)
        valid_N = labels_N != IGNORE
        with torch.enable_grad():
            leaf = logits_NW.detach().requires_grad_(gradients)
            every_N = vocab_parallel_cross_entropy(leaf, torch.where(valid_N, labels_N, 0))
        if gradients:
            (slope_NW,) = torch.autograd.grad(every_N, leaf, valid_N.to(every_N.dtype))
            logits_NV.copy_(slope_NW[:, :words])
        each_N = torch.where(valid_N, every_N.detach(), 0)
        nothing = each_N.new_zeros(())
        return each_N.sum(), nothing, nothing, each_N

    return compute
