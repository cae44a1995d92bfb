"""Rows x words; every divergence, of all words here and of words spread over ranks, and a teacher of 64 words."""

from __future__ import annotations

import torch

from headway.kernels.soft_targets import DIVERGENCES, Soft, TopTeacher
from headway.kernels.triton.soft_targets import soft_row_loss
from headway.kernels.triton.workloads import below, normal


def _call(device: torch.device, rows: int, vocab: int) -> None:
    student, teacher = (normal(device, rows, vocab).detach() for _ in range(2))
    valid = torch.ones(rows, dtype=torch.bool, device=device)
    for kind in DIVERGENCES:
        soft_row_loss(student, teacher, valid, Soft(2.0, kind), True)
        soft_row_loss(student, teacher, valid, Soft(2.0, kind), True, lambda x, op: x)
    values = normal(device, rows, 64).detach()
    words = torch.arange(64, dtype=torch.int32, device=device) + below(device, vocab - 64, rows, 1)
    top = TopTeacher(values, words.int(), (values.float() / 2).logsumexp(1) + 1)
    soft_row_loss(student, top, valid, Soft(2.0), True)


SIZES = {
    "4,096 x 32,768": lambda device: _call(device, 4096, 32768),
    "2,624 x 50,304": lambda device: _call(device, 2624, 50304),
    "1,024 x 131,072": lambda device: _call(device, 1024, 131072),
}
