"""Softmax attention on CPUs by a C++ kernel, in tiles: no map is held, and work is with what is seen.

PyTorch's fused kernel for CPUs has a slow backward in bf16, and no dropout, scopes, caps or slopes; FlexAttention has
no backward on CPU. The kernel (`kernels/cpp/attention.cpp`) takes them all; as an operator of our own it compiles
without a break of the graph.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, score_scale
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Scope, Window
from headway.kernels.attention.slopes import Bias, flat, learned
from headway.kernels.attention.tiles import block_mask
from headway.kernels.cpp import build

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


@torch.compiler.assume_constant_result
def unavailable(dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernel cannot compute here, or None if it can; the first call may compile it."""
    if dtype not in DTYPES:
        return f"it takes {', '.join(str(d).removeprefix('torch.') for d in DTYPES)}"
    reason = build.missing()
    if reason is None and dtype == torch.bfloat16 and not torch.ops.headway_cpp.bf16_products():
        return "this processor has no products of bf16"
    return reason


_SCOPES: dict[str, Scope] = {}
"""Scopes that were asked for, by what they are called: operators take no objects."""


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
    cap: float | None = None,
    sink_H: Tensor | None = None,
) -> Tensor:
    """Softmax attention, [B, H, Q, D] of v's width; see `compose.Form.reference`.

    Args:
        bias_HQK: added to the scores; gets a gradient, if it is a tensor.
        cap: bound of the scores, applied before slopes.
        sink_H: score of a key without a value.
    """
    what = described(q_BHQD, mask, dropout, scale, bias_HQK, cap)
    out: Tensor = _attention(q_BHQD, k_BKSD, v_BKSD, sink_H, learned(bias_HQK), *what)[0]
    return out


class Description(NamedTuple):
    """What the operators take beside queries, keys and values: a mask, dropout and the rest, taken apart.

    Attributes:
        scale, cap: of the scores; a cap of 0 is none.
        causal, window, scope: what is seen by places; no window is 0, another scope is given by its name.
        documents, key_documents, prefix: as in `Mask`.
        slopes, places: see `slopes.flat`.
        p, key, slots, positions, first_head, first_key: as in `WeightDropout`; no key drops nothing.
    """

    scale: float
    cap: float
    causal: bool
    window: int
    scope: str
    documents: Tensor | None
    key_documents: Tensor | None
    prefix: Tensor | None
    slopes: Tensor | None
    places: Tensor | None
    p: float
    key: Tensor | None
    slots: Tensor | None
    positions: Tensor | None
    first_head: int
    first_key: int


def described(
    q_BHQD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None,
    scale: float | None,
    bias_HQK: Bias | None,
    cap: float | None,
) -> Description:
    """What the operators take beside queries, keys and values."""
    assert mask.shift is None, "parts of a sequence are for row blocks"
    given: list[Any] = [score_scale(scale, q_BHQD), cap or 0.0, mask.triangular, mask.window or 0]
    given += ["" if mask.strip or mask.scope is None else _called(mask.scope)]
    prefix = mask.prefix if mask.causal else None
    given += [mask.documents, mask.key_documents, prefix, *flat(bias_HQK)]
    given += (0.0, None, None, None, 0, 0) if dropout is None else dropout
    return Description(*given)


@torch.compiler.disable
def _called(scope: Scope) -> str:
    name = repr(scope)
    _SCOPES[name] = scope
    return name


_WHAT = (
    "float scale, float cap, bool causal, int window, str scope, Tensor? documents, Tensor? key_documents, "
    "Tensor? prefix, Tensor? slopes, Tensor? places, float p, Tensor? key, Tensor? slots, Tensor? positions, "
    "int first_head, int first_key"
)
torch.library.define(
    "headway::attention_cpp",
    f"(Tensor q, Tensor k, Tensor v, Tensor? sink, Tensor? bias, {_WHAT}) -> (Tensor, Tensor)",
)
torch.library.define(
    "headway::attention_cpp_backward",
    "(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? sink, "
    f"Tensor? bias, bool wants_bias, {_WHAT}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
_attention = torch.ops.headway.attention_cpp
_backward = torch.ops.headway.attention_cpp_backward


@torch.library.impl("headway::attention_cpp", "cpu")
def _(
    q: Tensor, k: Tensor, v: Tensor, sink: Tensor | None, bias: Tensor | None, *what: Any
) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, D], and log-sum-exp of the scores [B, H, Q], a sink's among them."""
    out, lse = outputs(q, k, v, bias, Description(*what))
    if sink is not None:
        both = torch.logaddexp(lse, sink.unsqueeze(-1).to(lse.dtype))
        out.mul_((lse - both).exp_().unsqueeze(-1))
        lse = both
    return out, lse


@torch.library.impl("headway::attention_cpp_backward", "cpu")
def _(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sink: Tensor | None,
    bias: Tensor | None,
    wants_bias: bool,
    *what: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the sink and the bias; the last two are [0] where there is none, or none is wanted."""
    d_sink = lse.new_empty(0)
    if sink is not None:  # it takes what the weights leave
        delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1)
        d_sink = -((sink.unsqueeze(-1).to(lse.dtype) - lse).exp_() * delta).sum((0, 2)).to(sink.dtype)
    d_q, d_k, d_v, d_bias = gradients(d_out, q, k, v, out, lse, bias, wants_bias, Description(*what))
    return d_q, d_k, d_v, d_sink, d_bias


def outputs(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, what: Description) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp, -inf where nothing is seen."""
    build.load()
    out, lse = torch.ops.headway_cpp.attention(*_rows(q, k, v), *_lowered(what, q, k, bias))
    return out[..., : v.shape[-1]], lse


def gradients(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    wants_bias: bool,
    what: Description,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the bias, [0] if it is not wanted. Where these keys are a part of those that a query
    sees, `out` and `lse` are those of all of them."""
    operands = *_rows(d_out, q, k, v, out), lse.contiguous(), wants_bias
    *found, d_bias = torch.ops.headway_cpp.attention_backward(*operands, *_lowered(what, q, k, bias))
    d_q, d_k, d_v = (d[..., : x.shape[-1]] for d, x in zip(found, (q, k, v), strict=True))
    if k.shape[1] != q.shape[1]:
        d_k, d_v = (x.unflatten(1, (k.shape[1], -1)).sum(2) for x in (d_k, d_v))
    return d_q, d_k, d_v, d_bias if bias is None else d_bias.to(bias.dtype)


def _rows(*tensors: Tensor) -> list[Tensor]:
    """Tensors as the kernel wants them: their last dim dense, and even in bf16, whose products take pairs."""
    odd = (x.dtype == torch.bfloat16 and x.shape[-1] % 2 for x in tensors)
    even = (F.pad(x, (0, 1)) if o else x for x, o in zip(tensors, odd, strict=True))
    return [x if x.stride(-1) == 1 else x.contiguous() for x in even]


def _lowered(what: Description, q: Tensor, k: Tensor, bias: Tensor | None) -> list[Any]:
    """A description as the C++ operators take it: dense, of every row of the batch."""
    lengths = q.shape[2], k.shape[2]
    scope = Window(what.window) if what.window else _SCOPES[what.scope] if what.scope else None
    tiles = block_mask(what.causal, scope, *lengths)
    queries, keys = (None, None) if what.places is None else what.places.split(lengths)
    theirs = what.documents if what.key_documents is None else what.key_documents
    documents = (
        None if x is None else x.to(torch.int32).expand(len(q), -1) for x in (what.documents, theirs)
    )
    prefix = None if what.prefix is None else what.prefix.expand(len(q))
    slopes = None if what.slopes is None else what.slopes.double()
    bias = None if bias is None else bias.to(torch.promote_types(q.dtype, torch.float32))
    least = 0 if what.key is None else random.threshold(what.p)
    masked, added = (*documents, prefix), (bias, slopes, queries, keys)
    drop = what.key, what.slots, what.positions
    dense = [None if x is None else x.contiguous() for x in (*masked, *added, *drop)]
    where = what.first_head, what.first_key
    return [what.scale, what.cap, tiles.tensors, tiles.tile, *dense[:7], least, *dense[7:], *where]


def _by_place(like: Tensor, heads: int, length: int, width: int) -> Tensor:
    """[B, H, S, D] with the memory of [B, S, H, D]."""
    return like.new_empty(len(like), length, heads, width).transpose(1, 2)


@torch.library.register_fake("headway::attention_cpp")
def _(q, k, v, *rest):
    wide = torch.promote_types(q.dtype, torch.float32)
    return _by_place(q, q.shape[1], q.shape[2], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.register_fake("headway::attention_cpp_backward")
def _(d_out, q, k, v, out, lse, sink, bias, wants_bias, *what):
    found = [_by_place(x, x.shape[1], x.shape[2], x.shape[3]) for x in (q, k, v)]
    if k.shape[1] != q.shape[1]:
        found[1:] = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in found[1:]]
    none = lse.new_empty(0)
    d_sink = none if sink is None else torch.empty_like(sink)
    return (
        *found,
        d_sink,
        torch.empty_like(bias, memory_format=torch.contiguous_format) if wants_bias else none.clone(),
    )


def _setup(ctx, inputs, output):
    q, k, v, sink, bias, *what = inputs
    tensors = [x if isinstance(x, Tensor) else None for x in what]
    ctx.save_for_backward(q, k, v, *output, sink, bias, *tensors)
    ctx.numbers = [x if t is None else None for x, t in zip(what, tensors, strict=True)]
    ctx.mark_non_differentiable(output[1])


def _pull(ctx, d_out, _):
    q, k, v, out, lse, sink, bias, *tensors = ctx.saved_tensors  # once: a checkpoint unpacks nothing twice
    what = [x if t is None else t for x, t in zip(ctx.numbers, tensors, strict=True)]
    wants_bias = ctx.needs_input_grad[4]
    d_q, d_k, d_v, d_sink, d_bias = _backward(d_out, q, k, v, out, lse, sink, bias, wants_bias, *what)
    d_own = None if sink is None else d_sink, d_bias if wants_bias else None
    return d_q, d_k, d_v, *d_own, *[None] * len(what)


torch.library.register_autograd("headway::attention_cpp", _pull, setup_context=_setup)
