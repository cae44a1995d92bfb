"""Scopes, causal, of 8 heads over 2 of keys x tokens x head dimension."""

from __future__ import annotations

import torch

from headway.kernels import random
from headway.kernels.attention import scopes
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.triton.block_sparse import attention
from headway.kernels.triton.workloads import below, normal, packed


def call(
    device: torch.device,
    scope: scopes.Scope,
    length: int,
    width: int,
    *,
    drops: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward; `drops`: weights, and there are documents."""
    q, k = (normal(device, 1, heads, length, width, dtype=dtype) for heads in (8, 2))
    documents = drop = None
    if drops:
        documents = packed(device, 1, length).long()
        key, places = below(device, 2**62, 1)[0], torch.arange(length, device=device)
        drop = WeightDropout(0.1, key, torch.zeros_like(places[:1]), places)
    out = attention(q, k, k, Mask(True, documents, scope=scope), drop)
    torch.autograd.grad(out, [q, k], out)


BIGBIRD = scopes.BigBird(64, 2, 3, random.key(0, "bigbird"))

SIZES = {
    "longformer, 8,192 x 64, documents, dropout": lambda device: call(
        device, scopes.Global(512, 64, True), 8192, 64, drops=True
    ),
    "bigbird, 8,192 x 128": lambda device: call(device, BIGBIRD, 8192, 128),
    "strided, 4,096 x 256": lambda device: call(device, scopes.Strided(128), 4096, 256),
}
