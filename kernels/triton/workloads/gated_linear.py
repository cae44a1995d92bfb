"""Samples x heads of a width x tokens; the second with documents."""

from __future__ import annotations

import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.triton.gated_linear import gated_linear
from headway.kernels.triton.workloads import normal, packed


def call(
    device: torch.device,
    heads: int,
    key_heads: int,
    length: int,
    width: int,
    documents: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward."""
    q, k, v, decay = (
        normal(device, 8, count, length, width, dtype=dtype) for count in (heads, key_heads, key_heads, heads)
    )
    mask = Mask(documents=packed(device, 8, length) if documents else None)
    out = gated_linear(q, k, v, mask, decay=decay)
    torch.autograd.grad(out, (q, k, v, decay), torch.empty_like(out))


SIZES = {
    "8 x 12 heads of 64 x 1,024": lambda device: call(device, 12, 12, 1024, 64, False),
    "8 x 32 heads, 8 of keys, of 128 x 4,096": lambda device: call(device, 32, 8, 4096, 128, True),
    "8 x 8 heads of 256 x 8,192": lambda device: call(device, 8, 8, 8192, 256, False),
}
