"""Rows x width; a residual, RMSNorm and LayerNorm."""

from __future__ import annotations

import torch

from headway.kernels.triton.norm import norm
from headway.kernels.triton.workloads import normal


def _call(device: torch.device, rows: int, width: int) -> None:
    x, residual, weight = normal(device, rows, width), normal(device, rows, width), normal(device, width)
    for bias in (None, weight):
        y, total = norm(x, weight, bias, eps=1e-5, centred=bias is not None, residual=residual)
        torch.autograd.grad([y, total], [x, weight], [x, x])


SIZES = {
    "8,192 x 768": lambda device: _call(device, 8192, 768),
    "8,192 x 4,096": lambda device: _call(device, 8192, 4096),
    "16,384 x 8,192": lambda device: _call(device, 16384, 8192),
}
