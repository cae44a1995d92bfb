"""Weightings, causal, of 8 heads over 2 of keys x tokens x head dimension."""

from __future__ import annotations

import torch

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.weights import Entmax15, Sparsemax, Weighting
from headway.kernels.triton.sparse_weights import attention
from headway.kernels.triton.workloads import below, normal, packed


def call(
    device: torch.device,
    weighting: Weighting,
    length: int,
    width: int,
    mask: Mask = Mask(),
    *,
    documents: bool = False,
    drops: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward; `documents`: beside the mask; `drops`: weights."""
    q, k = (normal(device, 1, heads, length, width, dtype=dtype) for heads in (8, 2))
    if documents:
        mask = mask._replace(documents=packed(device, 1, length).long())
    drop = None
    if drops:
        key, places = below(device, 2**62, 1)[0], torch.arange(length, device=device)
        drop = WeightDropout(0.1, key, torch.zeros_like(places[:1]), places)
    out = attention(q, k, k, mask, weighting, drop)
    torch.autograd.grad(out, [q, k], out)


SIZES = {
    "entmax, 4,096 x 64, documents": lambda device: call(device, Entmax15(), 4096, 64, documents=True),
    "sparsemax, 4,096 x 128": lambda device: call(device, Sparsemax(), 4096, 128),
    "entmax, 2,048 x 256": lambda device: call(device, Entmax15(), 2048, 256),
}
