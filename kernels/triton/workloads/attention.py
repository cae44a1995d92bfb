"""Samples x heads of queries, over heads of keys, x tokens x head dimension, and what is beside."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.slopes import Slopes
from headway.kernels.triton.attention import attention
from headway.kernels.triton.workloads import below, normal


class Beside(NamedTuple):
    """What scores and weights get.

    Attributes:
        bias: `learned`, `slopes` or nothing.
        cap: bound of scores.
        sink: whether there are sinks.
        p: chance of a weight's being dropped.
    """

    bias: str = ""
    cap: float | None = None
    sink: bool = False
    p: float = 0.0


def call(
    device: torch.device,
    shape: tuple[int, int, int, int, int],
    beside: Beside,
    mask: Mask,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward; `shape`: samples, heads of queries and of keys, tokens, head dimension."""
    batch, heads, kv_heads, length, dim = shape
    q, k, v = (normal(device, batch, n, length, dim, dtype=dtype) for n in (heads, kv_heads, kv_heads))
    places = torch.arange(length, device=device)
    bias: Any = None
    if beside.bias == "learned":
        bias = normal(device, heads, length, length, dtype=torch.float32)
    elif beside.bias == "slopes":
        bias = Slopes(2.0 ** -torch.arange(heads, device=device, dtype=torch.float32), places, places)
    sink = normal(device, heads, dtype=torch.float32) if beside.sink else None
    dropout = None
    if beside.p:
        key, slots = below(device, 2**62, 1)[0], torch.arange(batch, device=device)
        dropout = WeightDropout(beside.p, key, slots, places)
    inputs = [x for x in (q, k, v, bias, sink) if isinstance(x, torch.Tensor)]
    out = attention(q, k, v, mask, dropout, bias_HQK=bias, softcap=beside.cap, sink=sink)
    torch.autograd.grad(out, inputs, torch.empty_like(out))


SIZES = {
    "8 x 12 x 1,024 x 64, learned bias, dropout": lambda device: call(
        device, (8, 12, 12, 1024, 64), Beside("learned", p=0.1), Mask(False)
    ),
    "4 x 32 over 8 x 4,096 x 128, causal, sink": lambda device: call(
        device, (4, 32, 8, 4096, 128), Beside(sink=True), Mask()
    ),
    "2 x 8 over 4 x 4,096 x 256, window, cap": lambda device: call(
        device, (2, 8, 4, 4096, 256), Beside(cap=50.0), Mask(scope=Window(1024))
    ),
}
