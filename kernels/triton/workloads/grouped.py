"""Rows x widths of input and output, in groups that are equally large."""

from __future__ import annotations

import torch

from headway.kernels.triton.grouped import linear
from headway.kernels.triton.workloads import normal


def _call(device: torch.device, rows: int, inner: int, outer: int, groups: int, dtype: torch.dtype) -> None:
    shapes = (rows, inner), (groups, outer, inner), (groups, outer)
    x, w, bias = (normal(device, *shape, dtype=dtype) for shape in shapes)
    ends = torch.arange(1, groups + 1, device=device) * (rows // groups)
    y = linear(x, w, bias, ends)
    torch.autograd.grad(y, [x, w, bias], y)


SIZES = {
    "16,384 x 1,024 x 4,096, 8 groups": lambda device: _call(device, 16384, 1024, 4096, 8, torch.bfloat16),
    "32,768 x 4,096 x 14,336, 8 groups": lambda device: _call(device, 32768, 4096, 14336, 8, torch.bfloat16),
    "16,384 x 1,024 x 4,096, 8 groups, fp32": lambda device: _call(
        device, 16384, 1024, 4096, 8, torch.float32
    ),
}
