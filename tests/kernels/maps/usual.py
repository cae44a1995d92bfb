"""The usual way to distil attention maps: maps by softmax, PyTorch's losses, and autograd.

In fp64 sums over n keys in another order differ by about n 1e-16 of their terms, which are below 1e2 here: 1e-12.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.slopes import Slopes
from headway.kernels.map_distillation import map_distillation_loss

FP64 = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-12)
HIDDEN = -1e9  # exp of it is 0, and 0 times it is: what transformers adds to scores that are not seen


def rows(loss: str, t: Tensor, s: Tensor, seen: Tensor) -> Tensor:
    """The usual way, from scores [B, G H, Q, S] and [B, H, Q, S] and bool [B, 1, Q, S]: losses of rows, [B, H, Q]."""
    t, keys = t.unflatten(1, (s.shape[1], -1)), seen.sum(-1).clamp(min=1)
    if loss == "scores":
        each = F.mse_loss(s, t.mean(2), reduction="none")
        return (each * seen).sum(-1) / keys
    p = torch.softmax(t.masked_fill(~seen.unsqueeze(2), HIDDEN), -1).mean(2)
    s = s.masked_fill(~seen, HIDDEN)
    q, log_q = torch.softmax(s, -1), torch.log_softmax(s, -1)
    log_p = torch.where(p > 0, p, 1).log().masked_fill(~seen, HIDDEN)
    if loss == "mse":
        return (F.mse_loss(q, p, reduction="none") * seen).sum(-1) / keys
    if loss == "kl":
        return F.kl_div(log_q, p, reduction="none").sum(-1)
    if loss == "reverse_kl":
        return F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    m = ((p + q) / 2).clamp(min=1e-300).log()
    both = F.kl_div(m, p, reduction="none") + F.kl_div(m, log_q, reduction="none", log_target=True)
    return both.sum(-1) / 2


def scores(q: Tensor, k: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = q @ k.mT * (scale or 1 / math.sqrt(q.shape[-1]))
    return found if bias is None else found + bias


def draw(*shape: int, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_(grad)


def padding(batch: int, length: int) -> Tensor:
    """The last sample is half padding."""
    real = torch.ones(batch, length, dtype=torch.bool)
    real[-1, length // 2 :] = False
    return real


def documents(batch: int, length: int) -> Tensor:
    """Three documents and padding in every sample."""
    return ((torch.arange(length) * 4 // length + 1) % 4 - 1).expand(batch, -1)


BATCH, LENGTH = 2, 41
PREFIX = torch.tensor([5, 17])
SPOTS = torch.rand(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.3
SPOTS[:, :, 7] = False  # a row that sees nothing
SQUARE = {
    "whole": {},
    "causal": {"causal": True},
    "padding": {"mask": padding(BATCH, LENGTH)},
    "padding, causal": {"mask": padding(BATCH, LENGTH), "causal": True},
    "documents": {"mask": Mask(True, documents(BATCH, LENGTH))},
    "window": {"mask": Mask(False, scope=Window(6))},
    "window, causal": {"mask": Mask(True, scope=Window(6))},
    "prefix": {"mask": Mask(True, prefix=PREFIX)},
    "pairs": {"mask": SPOTS},
    "pairs, causal": {"mask": SPOTS, "causal": True},
    "keys": {"mask": padding(BATCH, LENGTH)[:, None, None]},
}
"""Arguments of self-attention."""


def seen_by(arguments: dict, batch: int, queries: int, keys: int) -> tuple[Tensor, Tensor]:
    """What the arguments say, written out: seen [B, 1, Q, S] and rows that count [B, 1, Q]."""
    mask, causal = arguments.get("mask"), arguments.get("causal", False)
    seen = torch.ones(batch, 1, queries, keys, dtype=torch.bool)
    counts = torch.ones(batch, 1, queries, dtype=torch.bool)
    if isinstance(mask, Mask):
        found = lower(mask, queries, keys, torch.device("cpu"))
        seen = seen if found is None else seen & found
        counts = counts if mask.documents is None else mask.documents[:, None] >= 0
    elif mask is not None and mask.dim() == 2:
        seen = seen & mask[:, None, None]
        counts = mask[:, None] if queries == keys else counts
    elif mask is not None:
        seen = seen & mask
    if causal:
        seen = seen & torch.ones(queries, keys, dtype=torch.bool).tril()
    return seen, counts & seen.any(-1)


def check(loss: str, kernel: str, inputs: list[Tensor], arguments: dict, close=FP64) -> None:
    """Loss and gradients of q, k (and of a bias) against the usual way; `inputs`: q and k of teacher and student."""
    qt, kt, qs, ks = inputs
    scale, bias_t, bias_s = (arguments.get(x) for x in ("scale", "teacher_bias", "student_bias"))
    leaves = [qs, ks] if bias_s is None else [qs, ks, bias_s]
    seen, counts = seen_by(arguments, len(qs), qs.shape[2], ks.shape[2])
    bias_t = bias_t.block() if isinstance(bias_t, Slopes) else bias_t
    each = rows(
        loss,
        scores(qt, kt, arguments.get("teacher_scale", scale), bias_t),
        scores(qs, ks, scale, bias_s),
        seen,
    )
    theirs = torch.where(counts, each, 0).sum() / (counts.sum() * qs.shape[1])
    ours = map_distillation_loss(qt, kt, qs, ks, loss=loss, kernel=kernel, **arguments)
    close(ours, theirs)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        close(a, b)


def four(teacher=(2, 2, 8), student=(2, 2, 8), queries=LENGTH, keys=LENGTH, batch=BATCH) -> list[Tensor]:
    """q and k of teacher and student, by (heads, key heads, width)."""
    out = []
    for (heads, key_heads, width), grad in ((teacher, False), (student, True)):
        out += [draw(batch, heads, queries, width, grad=grad), draw(batch, key_heads, keys, width, grad=grad)]
    return out
