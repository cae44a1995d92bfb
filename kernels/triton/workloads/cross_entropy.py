"""Rows x words; with gradients, with a z-loss and smoothing, without gradients, and words as of one rank of eight."""

from __future__ import annotations

import torch

from headway.kernels.triton.cross_entropy import loss_of_shares, own_shares, row_loss
from headway.kernels.triton.workloads import below, normal


def _call(device: torch.device, rows: int, vocab: int) -> None:
    logits, labels = normal(device, rows, vocab).detach(), below(device, vocab, rows)
    row_loss(logits, labels, 0.0, True)
    row_loss(logits, labels, 1e-4, True, 0.1, True)
    row_loss(logits, labels, 0.0, False)
    shares = own_shares(logits, labels, vocab, True, True)
    loss_of_shares(logits, labels, vocab, 8 * vocab, shares, 1e-4, True, 0.1)


SIZES = {
    "4,096 x 32,768": lambda device: _call(device, 4096, 32768),
    "2,624 x 50,304": lambda device: _call(device, 2624, 50304),
    "1,024 x 131,072": lambda device: _call(device, 1024, 131072),
}
