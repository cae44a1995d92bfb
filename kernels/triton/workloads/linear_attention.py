"""Samples x heads x tokens, and features of queries and keys."""

from __future__ import annotations

import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.triton.linear_attention import linear_attention
from headway.kernels.triton.workloads import normal, packed


def call(
    device: torch.device,
    heads: int,
    key_heads: int,
    length: int,
    features: int,
    width: int,
    joined: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward; `joined`: with documents and levels."""
    shapes = (heads, features), (key_heads, features), (key_heads, width)
    q, k, v = (normal(device, 8, count, length, size, dtype=dtype) for count, size in shapes)
    mask, level = Mask(), None
    if joined:
        mask = Mask(documents=packed(device, 8, length))
        level = torch.zeros(8, key_heads, length, device=device)
    out = linear_attention(q, k, v, mask, level, 1.0)  # a floor, as these features are of either sign
    torch.autograd.grad(out, (q, k, v), torch.empty_like(out))


SIZES = {
    "8 x 12 heads x 1,024, 64 features": lambda device: call(device, 12, 12, 1024, 64, 64, False),
    "8 x 32 heads, 8 of keys, x 4,096, 128 features": lambda device: call(
        device, 32, 8, 4096, 128, 128, False
    ),
    "8 x 16 heads x 8,192, 256 features, documents": lambda device: call(device, 16, 16, 8192, 256, 64, True),
}
