"""Batch x places x width; a residual, without and with a bias."""

from __future__ import annotations

import torch

from headway.kernels.triton.dropout import dropout
from headway.kernels.triton.workloads import below, normal


def _call(device: torch.device, batch: int, places: int, width: int) -> None:
    x, residual, bias = (
        normal(device, *shape) for shape in ((batch, places, width), (batch, places, width), (width,))
    )
    key, slot, position = (below(device, 1 << 32, *shape) for shape in ((), (batch, 1), (1, places)))
    for more in ({"residual": residual}, {"residual": residual, "bias": bias}):
        y = dropout(x, 0.1, key, (slot, position, 0), **more)
        torch.autograd.grad(y, [x, *more.values()], y)


SIZES = {
    "16 x 512 x 768": lambda device: _call(device, 16, 512, 768),
    "4 x 2,048 x 4,096": lambda device: _call(device, 4, 2048, 4096),
    "8 x 2,048 x 8,192": lambda device: _call(device, 8, 2048, 8192),
}
