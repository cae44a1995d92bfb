"""The tensors that AdamW is measured on."""

from __future__ import annotations

import torch

from headway.kernels.triton.lamb import lamb
from headway.kernels.triton.workloads.adamw import HOW, MODEL, lists, scales


def _call(device: torch.device, *sizes: int, scaled: bool = False) -> None:
    lamb(**lists(device, sizes), **HOW, **(scales(device) if scaled else {}))


SIZES = {
    "148 tensors, 124 million": lambda device: _call(device, *MODEL),
    "one of 1 billion": lambda device: _call(device, 1 << 30),
    "1,000 of 4,096, with a scale": lambda device: _call(device, *[4096] * 1000, scaled=True),
}
