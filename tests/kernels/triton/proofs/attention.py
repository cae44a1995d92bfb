"""Softmax attention with caps, biases, sinks and dropout.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.compose import Form
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.scores import DOT_PRODUCT, SoftCap
from headway.kernels.attention.slopes import Distances, Slopes, block_of, geometric
from headway.kernels.attention.weights import SOFTMAX, Sink
from headway.kernels.triton.attention import attention
from headway.kernels.triton.workloads import attention as workload
from headway.tests.kernels.triton import attention_costs as costs
from headway.tests.kernels.triton.attention_bounds import tolerances
from headway.tests.kernels.triton.proof import Case, Result, drawn, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


class Sizes(NamedTuple):
    """Samples, query heads, key heads, queries, keys, head dimensions of keys and of values."""

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    dim: int
    value_dim: int


Masks = Callable[[Sizes], Mask]


class Extra(NamedTuple):
    """What is beside queries, keys and values.

    Attributes:
        bias: `learned`, `slopes`, `distances` or none.
        sink: whether there is one.
        cap: of the scores.
        p: chance that a weight is dropped.
        scale: factor of standard normal queries.
    """

    bias: str = ""
    sink: bool = False
    cap: float | None = None
    p: float = 0.0
    scale: float = 1.0


def _case(sizes: Sizes, dtype: torch.dtype, masks: Masks, extra: Extra = Extra()) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        b, h, k, q, s, d, d_v = sizes
        given = {
            "q": drawn(draw, b, h, q, d, dtype=dtype) * extra.scale,
            "k": drawn(draw, b, k, s, d, dtype=dtype),
            "v": drawn(draw, b, k, s, d_v, dtype=dtype),
        }
        if extra.bias == "learned":
            given["bias"] = drawn(draw, h, q, s)
        if extra.sink:
            given["sink"] = drawn(draw, h)
        d_out = drawn(draw, b, h, q, d_v, dtype=dtype).detach()
        mask, dropout, slopes = masks(sizes), _dropout(sizes, extra.p), _described(sizes, extra.bias, draw)
        ours = {name: x.detach().to(device).requires_grad_() for name, x in given.items()}
        out = attention(
            *(ours[name] for name in "qkv"), _on(mask, device), _on(dropout, device),
            bias_HQK=ours.get("bias", _on(slopes, device)), softcap=extra.cap, sink=ours.get("sink"),
        )  # fmt: skip
        found = torch.autograd.grad(out, list(ours.values()), d_out.to(device))
        wide = {name: x.detach().double().requires_grad_() for name, x in given.items()}
        wanted_out = _reference(wide, mask, dropout, slopes, extra)
        wanted = torch.autograd.grad(wanted_out, list(wide.values()), d_out.double())
        with torch.no_grad():
            far = _tolerances(wide, mask, dropout, slopes, extra, d_out.double(), ROUNDING[dtype])
        results = {"out": Result(out, wanted_out, far["out"])}
        for name, gradient, true in zip(given, found, wanted, strict=True):
            results[f"d_{name}"] = Result(gradient, true, far[name])
        return results

    return compute


def _dropout(sizes: Sizes, p: float) -> WeightDropout | None:
    if not p:
        return None
    slots, positions = torch.arange(sizes.batch) + 5, torch.arange(sizes.queries) + 1000
    return WeightDropout(p, torch.tensor(random.key(seed(), "weights")), slots, positions, 2, 16)


def _described(sizes: Sizes, bias: str, draw: torch.Generator) -> Slopes | Distances | None:
    if bias == "slopes":
        return Slopes(
            torch.tensor(geometric(sizes.heads)), torch.arange(sizes.queries), torch.arange(sizes.keys)
        )
    if bias == "distances":
        table = torch.randn(sizes.heads, 2 * sizes.keys - 1, generator=draw)
        return Distances.whole(table, sizes.keys)
    return None


def _on(x: Any, device: torch.device) -> Any:
    """A description with its tensors on a device."""
    if isinstance(x, tuple):
        return type(x)(*(_on(each, device) for each in x))  # type: ignore[arg-type]
    return x.to(device) if isinstance(x, Tensor) else x


def _reference(
    x: dict[str, Tensor],
    mask: Mask,
    dropout: WeightDropout | None,
    slopes: Slopes | Distances | None,
    extra: Extra,
) -> Tensor:
    weighting, own_name = (Sink(), "sink") if extra.sink else (SOFTMAX, None)
    form = Form(SoftCap() if extra.cap else DOT_PRODUCT, weighting, own_name)
    own = ({"sink": x["sink"]} if extra.sink else {}) | ({"softcap": extra.cap} if extra.cap else {})
    return form.reference(x["q"], x["k"], x["v"], mask, dropout, None, x.get("bias", slopes), **own)


def _tolerances(
    x: dict[str, Tensor], mask: Mask, dropout: WeightDropout | None, slopes: Slopes | Distances | None, extra: Extra,
    d_out: Tensor, unit: float,
) -> dict[str, float]:  # fmt: skip
    q, keys = x["q"], x["k"].shape[2]
    bias = x.get("bias", slopes)
    factor: Tensor | float = 1.0
    if dropout is not None:
        factor = dropout.kept(q.shape[1], slice(None), slice(0, keys)).double() * random.kept_scale(dropout.p)
    seen = lower(mask, q.shape[2], keys, q.device)
    return tolerances(x, None if bias is None else block_of(bias), extra.cap, seen, factor, d_out, unit)


# -- masks ---------------------------------------------------------------------------------------------------------


def _full(sizes: Sizes) -> Mask:
    return Mask(causal=False)


def _causal(sizes: Sizes) -> Mask:
    return Mask()


def _packed(sizes: Sizes) -> Mask:
    """Three documents of a sequence, then padding."""
    places = torch.arange(sizes.queries)
    one = torch.where(places > sizes.queries - 4, -1, places * 3 // sizes.queries)
    return Mask(True, one.expand(sizes.batch, -1))


def _padded(sizes: Sizes) -> Mask:
    """Cross-attention to padded keys; a query in four sees nothing."""
    queries = torch.where(torch.arange(sizes.queries) % 4 == 3, 7, 0).expand(sizes.batch, -1)
    keys = torch.where(torch.arange(sizes.keys) > sizes.keys // 2, -1, 0).expand(sizes.batch, -1)
    return Mask(False, queries, keys)


def _prefixed(sizes: Sizes) -> Mask:
    return Mask(prefix=torch.arange(sizes.batch) * 20 + 3)


def _windowed(sizes: Sizes) -> Mask:
    return Mask(scope=Window(19))


def _near(sizes: Sizes) -> Mask:
    return Mask(causal=False, scope=Window(7))


def _strided(sizes: Sizes) -> Mask:
    from headway.kernels.attention.scopes import Dilated

    return Mask(scope=Dilated(4, 3))


def _hidden(sizes: Sizes) -> Mask:
    """Nobody sees anything."""
    zeros = torch.zeros(sizes.batch, sizes.queries, dtype=torch.int64)
    return Mask(False, zeros, torch.ones(sizes.batch, sizes.keys, dtype=torch.int64))


def _later(sizes: Sizes) -> Mask:
    """A part of a sequence whose keys come before."""
    return Mask(shift=-sizes.keys // 2)


_F, _B = torch.float32, torch.bfloat16
EVERYTHING = Extra("learned", True, 5.0, 0.1)
OFTEN = (
    "padding, bf16, dropout",
    "part of a sequence, fp32, sink",
    "prefix, bf16, cap",
    "large logits, fp32",
)
CASES: dict[str, Case] = {
    "documents, fp32, everything": _case(Sizes(1, 2, 1, 37, 37, 20, 24), _F, _packed, EVERYTHING),
    "causal, fp32, learned bias, dropout": _case(Sizes(2, 1, 1, 67, 67, 40, 40), _F, _causal, Extra("learned", p=0.2)),
    "causal, bf16": _case(Sizes(1, 2, 1, 131, 131, 64, 64), _B, _causal),
    "full, bf16, learned bias": _case(Sizes(2, 2, 2, 50, 70, 64, 64), _B, _full, Extra("learned")),
    "full, fp32, values narrower": _case(Sizes(1, 2, 2, 33, 50, 128, 80), _F, _full),
    "documents, bf16, everything": _case(Sizes(2, 2, 1, 71, 71, 80, 40), _B, _packed, EVERYTHING),
    "documents, fp32": _case(Sizes(2, 2, 1, 70, 70, 64, 64), _F, _packed),
    "padding, fp32, sink": _case(Sizes(2, 2, 2, 41, 60, 40, 40), _F, _padded, Extra(sink=True)),
    "padding, bf16, dropout": _case(Sizes(2, 2, 2, 41, 60, 64, 64), _B, _padded, Extra(p=0.5)),
    "prefix, fp32, learned bias": _case(Sizes(2, 1, 1, 70, 70, 40, 40), _F, _prefixed, Extra("learned")),
    "prefix, bf16, cap": _case(Sizes(2, 1, 1, 70, 70, 64, 64), _B, _prefixed, Extra(cap=2.0)),
    "window, fp32, slopes": _case(Sizes(1, 2, 2, 101, 101, 40, 40), _F, _windowed, Extra("slopes")),
    "window, bf16, learned bias": _case(Sizes(1, 2, 1, 150, 150, 64, 64), _B, _windowed, Extra("learned")),
    "distances, fp32, sink": _case(Sizes(1, 2, 2, 66, 66, 40, 40), _F, _full, Extra("distances", True)),
    "window both ways, fp32": _case(Sizes(1, 1, 1, 70, 70, 64, 64), _F, _near),
    "dilated scope, fp32": _case(Sizes(1, 2, 2, 70, 70, 40, 40), _F, _strided),
    "part of a sequence, fp32, sink": _case(Sizes(1, 2, 2, 40, 30, 40, 40), _F, _later, Extra(sink=True)),
    "nothing seen, bf16, everything": _case(Sizes(1, 2, 2, 20, 30, 40, 40), _B, _hidden, EVERYTHING),
    "nothing seen, fp32": _case(Sizes(1, 2, 2, 20, 30, 40, 40), _F, _hidden),
    "one row, fp32": _case(Sizes(1, 1, 1, 1, 1, 40, 40), _F, _causal),
    "one query, bf16": _case(Sizes(1, 1, 1, 1, 65, 128, 128), _B, _full, Extra(sink=True)),
    "head dimension 128, bf16": _case(Sizes(1, 1, 1, 70, 70, 128, 128), _B, _causal, Extra("slopes")),
    "head dimension 256, bf16": _case(Sizes(1, 1, 1, 50, 50, 256, 256), _B, _causal),
    "head dimension 256, fp32": _case(Sizes(1, 1, 1, 20, 20, 256, 256), _F, _causal),
    "fp16, learned bias": _case(Sizes(1, 2, 1, 66, 66, 64, 64), torch.float16, _causal, Extra("learned")),
    "large logits, fp32": _case(Sizes(1, 2, 2, 40, 40, 40, 40), _F, _causal, Extra(sink=True, scale=3e3)),
    "large logits, bf16": _case(Sizes(1, 2, 2, 40, 40, 40, 40), _B, _causal, Extra(scale=3e3)),
    "large logits, bf16, cap": _case(Sizes(1, 2, 2, 40, 40, 40, 40), _B, _causal, Extra(cap=30.0, scale=3e3)),
}  # fmt: skip


# -- sizes ---------------------------------------------------------------------------------------------------------


def _compiled(dim: int, dtype: torch.dtype, *, places: bool = False) -> Callable[[], None]:
    """All that attention may have at once, of a head dimension: with a learned bias, or else what places decide."""
    documents, prefix = torch.zeros(2, 256, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    mask, beside = Mask(True, documents), workload.Beside("learned", 5.0, True, 0.1)
    if places:
        mask = Mask(True, documents, None, prefix, scope=Window(100))
        beside = beside._replace(bias="slopes")
    return lambda: workload.call(torch.device("cpu"), (2, 4, 2, 256, dim), beside, mask, dtype)


COMPILED = {
    f"head dimension {dim}, {name}": _compiled(dim, dtype)
    for name, dtype in (("bf16", _B), ("fp32", _F))
    for dim in (40, 64, 128, 256)
} | {f"head dimension {dim}, bf16, places": _compiled(dim, _B, places=True) for dim in (64, 128, 256)}
"""One for every row of tiles, and heads whose width 16 does not divide."""

COSTS = {
    "attention_forward_kernel": costs.forward,
    "attention_delta_kernel": costs.delta,
    "attention_queries_kernel": costs.queries,
    "attention_keys_kernel": costs.keys,
    "attention_bias_kernel": costs.bias,
}
