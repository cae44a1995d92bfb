"""Softmax attention by Triton kernels, on GPUs, in O(S) memory: what no well-kept fused kernel has together.

FlashAttention and SDPA have no bias that learns, no sinks, no caps and a dropout that depends on layout; FlexAttention
(which the choice should prefer where it can: it skips blocks of documents too) has no such dropout, and gives a learned
bias its gradient by atomics, in an order of its own. Here are all of these, values of another width than keys
(DeepSeek-AI 2024, section 2.1), and head dimensions that are no powers of two.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.dense import WeightDropout, score_scale
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Fixed, learned
from headway.kernels.attention.triton import WIDEST
from headway.kernels.triton import attention_kernels as kernels
from headway.kernels.triton.attention_configs import BIAS, DELTA, FORWARD, KEYS, QUERIES, VALUES
from headway.kernels.triton.attention_operands import Lowered, biases, common, dropped, heads, lowered, padded
from headway.kernels.triton.attention_tiles import Dropped
from headway.kernels.triton.map_tiles import Model, Sizes

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOGETHER = 128
"""Head dimension up to which gradients of keys and of values are computed together."""


@torch.compiler.disable  # Triton compiles the kernels itself
def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Fixed | None = None,
    *,
    softcap: float | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """softmax(softcap tanh(scale Q K^T / softcap) + bias) V, [B, H, Q, D] of v's width; 0 where nothing is seen.

    Args:
        mask: scopes other than windows, and masks of parts of a sequence, are written out, bool [Q, S].
        dropout: of weights, bit for bit that of `random.keep`.
        bias_HQK: added to scores, after the cap; a tensor gets a gradient, fp32 while it is summed over samples.
        softcap: bound of the scores (Gemma Team 2024, section 2).
        sink: [H], the score of a key without a value (OpenAI 2025, gpt-oss); gets a gradient.

    Raises:
        KernelUnavailable: a dtype, a head dimension, or where dropout's keys begin, is not for these kernels.
        ValueError: heads, lengths or a mask do not fit together.
    """
    _check(q_BHQD, k_BKSD, v_BKSD, mask)
    place = _Place(
        score_scale(scale, q_BHQD), softcap, lowered(mask, q_BHQD, k_BKSD), dropped(dropout), bias_HQK
    )
    out: Tensor = _Attention.apply(q_BHQD, k_BKSD, v_BKSD, learned(bias_HQK), sink, place)
    return out


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            rule = f"it takes fp32, bf16 or fp16, the same of all, and {name} is {x.dtype}"
            raise KernelUnavailable("triton", rule, "reference")
        if x.shape[-1] > WIDEST:
            raise KernelUnavailable(
                "triton", f"it takes heads up to {WIDEST} wide, not {name} of {x.shape[-1]}", "flex"
            )
    if q.shape[1] % k.shape[1] or k.shape[:3] != v.shape[:3] or len(q) != len(k):
        found = ", ".join(str(list(x.shape)) for x in (q, k, v))
        rule = "[B, H, Q, D], [B, K, S, D] and [B, K, S, any], H a multiple of K"
        raise ValueError(f"q, k, v of shapes {found}: they must be {rule}")
    if mask.split is not None:
        raise ValueError(f"mask.split {mask.split}: only a core that knows which columns are here takes it")
    if mask.causal and mask.shift is None and q.shape[2] != k.shape[2]:
        raise ValueError(f"mask.causal with {q.shape[2]} queries and {k.shape[2]} keys: it needs as many")


class _Place(NamedTuple):
    """What is no operand with a gradient."""

    scale: float
    cap: float | None
    mask: Lowered
    drop: Dropped | None
    bias: Fixed | None


class _Call(NamedTuple):
    """What all kernels of a call share."""

    place: _Place
    model: Model
    v: Any
    sizes: Sizes
    device: torch.device
    itemsize: int
    constants: dict[str, Any]

    @staticmethod
    def of(place: _Place, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *others: Tensor) -> _Call:
        model = Model(
            heads(q),
            heads(k),
            biases(place.bias if bias is None else bias),
            place.scale,
            q.shape[1] // k.shape[1],
        )
        batch, count, length, _ = q.shape
        sizes = Sizes(batch, count, length, k.shape[2])
        widths = {"D": q.shape[-1], "W": padded(q.shape[-1]), "D_V": v.shape[-1], "W_V": padded(v.shape[-1])}
        constants = {"CAUSAL": place.mask.causal, "BY": common(q, k, v, *others), **widths}
        return _Call(place, model, heads(v), sizes, q.device, q.element_size(), constants)

    def config(self, space: Any) -> Any:
        """The configuration of a kernel of this call."""
        return space.choose(self.device, width=self.width, itemsize=self.itemsize)

    @property
    def width(self) -> int:
        """By which tiles are chosen."""
        return max(self.constants["W"], self.constants["W_V"])


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, bias, sink, place):
        out = _by_place(q, v.shape[-1])
        call = _Call.of(place, q, k, v, bias, out)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        config = call.config(FORWARD)
        size = call.sizes
        programs = size.batch * size.heads * triton.cdiv(size.queries, config.tiles["M"])
        own = None if sink is None else sink.contiguous()
        given = call.model, call.v, own, place.cap, *place.mask[:2], place.drop, size, heads(out), lse
        with torch.cuda.device_of(q):
            kernels.attention_forward_kernel[programs,](*given, **call.constants, **config.options)
        ctx.save_for_backward(q, k, v, bias, sink, out, lse)
        ctx.place = place if bias is None else place._replace(bias=None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, bias, sink, out, lse = ctx.saved_tensors
        call = _Call.of(ctx.place, q, k, v, bias, out, d_out)
        with torch.cuda.device_of(q):
            delta = _delta(call, out, lse, d_out)
            kept = lse, heads(d_out), delta
            dq = _of_queries(call, q, kept) if ctx.needs_input_grad[0] else None
            dk, dv = _of_keys(call, k, v, kept, ctx.needs_input_grad[1:3])
            d_bias = _of_bias(call, bias, kept) if ctx.needs_input_grad[3] else None
        d_sink = None
        if sink is not None and ctx.needs_input_grad[4]:  # it takes what the weights leave
            d_sink = -((sink.float().unsqueeze(-1) - lse).exp() * delta).sum((0, 2)).to(sink.dtype)
        return dq, dk, dv, d_bias, d_sink, None


def _delta(call: _Call, out: Tensor, lse: Tensor, d_out: Tensor) -> Tensor:
    """Sums of outputs times their gradients, [B, H, Q]."""
    delta = torch.empty_like(lse)
    config, size = call.config(DELTA), call.sizes
    programs = size.batch * size.heads * triton.cdiv(size.queries, config.tiles["M"])
    widths = {name: call.constants[name] for name in ("D_V", "W_V", "BY")}
    kernels.attention_delta_kernel[programs,](
        size, heads(out), heads(d_out), delta, **widths, **config.options
    )
    return delta


def _of_queries(call: _Call, q: Tensor, kept: tuple[Any, ...]) -> Tensor:
    """Gradient of queries; `kept`: log-sum-exps, the output's gradient, and sums of outputs times it."""
    dq = _by_place(q, q.shape[-1])
    config, size, place = call.config(QUERIES), call.sizes, call.place
    programs = size.batch * size.heads * triton.cdiv(size.queries, config.tiles["M"])
    given = call.model, call.v, place.cap, *place.mask[:2], place.drop, size
    kernels.attention_queries_kernel[programs,](*given, *kept, heads(dq), **call.constants, **config.options)
    return dq


def _of_keys(
    call: _Call, k: Tensor, v: Tensor, kept: tuple[Any, ...], wanted: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of keys and values, those that are wanted; `kept`: as `_of_queries` has it. Of wide heads a launch
    computes one of them: sums of both do not fit into registers."""
    dk, dv = (_by_place(x, x.shape[-1]) if want else None for x, want in zip((k, v), wanted, strict=True))
    size, place = call.sizes, call.place
    given = call.model, call.v, place.cap, *place.mask[:2], place.drop, size
    for pair in ((dk, None), (None, dv)) if call.width > TOGETHER else ((dk, dv),):
        if any(x is not None for x in pair):
            config = call.config(VALUES if pair[0] is None else KEYS)
            programs = size.batch * k.shape[1] * triton.cdiv(size.keys, config.tiles["N"])
            into = (None if x is None else heads(x) for x in pair)
            kernels.attention_keys_kernel[programs,](*given, *kept, *into, **call.constants, **config.options)
    return dk, dv


def _of_bias(call: _Call, bias: Tensor, kept: tuple[Any, ...]) -> Tensor:
    """Gradient of a bias."""
    wide = torch.empty(bias.shape, dtype=torch.float32, device=bias.device)
    config, size, place = call.config(BIAS), call.sizes, call.place
    programs = (
        size.heads * triton.cdiv(size.queries, config.tiles["M"]) * triton.cdiv(size.keys, config.tiles["N"])
    )
    given = call.model, call.v, place.cap, place.mask.seen, place.drop, size
    kernels.attention_bias_kernel[programs,](*given, *kept, wide, **call.constants, **config.options)
    return wide.to(bias.dtype)


def _by_place(like_BHSD: Tensor, width: int) -> Tensor:
    """[B, H, S, width] with the memory of [B, S, H, width], as projections want it."""
    batch, count, length, _ = like_BHSD.shape
    return like_BHSD.new_empty(batch, length, count, width).transpose(1, 2)
