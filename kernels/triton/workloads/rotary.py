"""Batch x places x heads of queries and keys."""

from __future__ import annotations

import torch

from headway.kernels.rotary import Rotation
from headway.kernels.triton.rotary import rotate
from headway.kernels.triton.workloads import normal


def _call(device: torch.device, batch: int, places: int, heads: int, key_heads: int, dim: int) -> None:
    q, k = (normal(device, batch, places, count, dim) for count in (heads, key_heads))
    angles = torch.rand(places, dim // 2, device=device)
    turned = rotate(q.transpose(1, 2), k.transpose(1, 2), Rotation(angles, angles))
    torch.autograd.grad(turned, [q, k], turned)


SIZES = {
    "32 x 1,024 x 12 of 64": lambda device: _call(device, 32, 1024, 12, 12, 64),
    "4 x 4,096 x 32 and 8 of 128": lambda device: _call(device, 4, 4096, 32, 8, 128),
    "1 x 32,768 x 64 and 8 of 128": lambda device: _call(device, 1, 32768, 64, 8, 128),
}
