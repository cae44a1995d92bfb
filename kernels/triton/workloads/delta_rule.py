"""Samples x heads of a width x tokens; the second with documents."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from headway.kernels.attention.masks import Mask
from headway.kernels.triton.delta_rule import delta_rule
from headway.kernels.triton.workloads import normal, packed


def call(
    device: torch.device,
    heads: int,
    length: int,
    width: int,
    documents: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward."""
    shape = 8, heads, length
    q, k, v = (F.normalize(normal(device, *shape, width, dtype=dtype), dim=-1) for _ in range(3))
    beta, log = (normal(device, *shape, dtype=torch.float32).sigmoid() for _ in range(2))
    mask = Mask(documents=packed(device, 8, length) if documents else None)
    out = delta_rule(q, k, v, mask, beta_BHS=beta, log_decay_BHS=-log)
    torch.autograd.grad(out, (q, k, v, beta, log), torch.empty_like(out))


SIZES = {
    "8 x 12 heads of 64 x 1,024": lambda device: call(device, 12, 1024, 64, False),
    "8 x 32 heads of 128 x 4,096": lambda device: call(device, 32, 4096, 128, True),
    "8 x 8 heads of 256 x 8,192": lambda device: call(device, 8, 8192, 256, False),
}
