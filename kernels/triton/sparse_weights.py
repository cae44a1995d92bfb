"""Sparsemax and 1.5-entmax attention by Triton kernels: `weights.Sparsemax` and `weights.Entmax15` in O(S) memory.

No fused kernel of others computes these without a matrix of scores. `sparse_weight_kernels` has the mathematics, and
why keys are read more often than once.

Shapes: B batch, H query heads, K key heads, Q queries, S keys, D head dimension; M queries and N keys of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.dense import WeightDropout, score_scale
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.triton import WIDEST
from headway.kernels.attention.weights import Entmax15, Sparsemax, Weighting
from headway.kernels.triton import sparse_weight_kernels as kernels
from headway.kernels.triton.attention_operands import common, conditions, dropped, heads, padded
from headway.kernels.triton.attention_tiles import Dropped
from headway.kernels.triton.map_tiles import Sizes
from headway.kernels.triton.sparse_configs import (
    WEIGHT_FORWARD,
    WEIGHT_KEYS,
    WEIGHT_QUERIES,
    columns,
    key_launches,
)
from headway.kernels.triton.tuning import Space

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PASSES = 8
"""Over the keys, for a threshold: it is off by 2^-8 at most, and by a few roundings of a score in practice."""


@torch.compiler.disable  # Triton compiles the kernels itself
def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    weighting: Weighting,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention with sparse weights of scale Q K^T, [B, H, Q, D]; see `weights`, their specification.

    Rows that see nothing are 0. Gradients for queries, keys and values.

    Args:
        mask: of whole sequences: causality, documents, a prefix, a window.
        weighting: `Sparsemax` or `Entmax15`.
        dropout: of the weights.
        scale: factor of the products; 1 / sqrt(D) if None.

    Raises:
        KernelUnavailable: the weighting, mask, shapes or dtypes are not for these kernels.
    """
    _check(q_BHQD, k_BKSD, v_BKSD, mask, weighting)
    power = 1 if type(weighting) is Sparsemax else 2
    how = _How(mask.causal, power, score_scale(scale, q_BHQD) / power, dropped(dropout))
    found: Tensor = _Attention.apply(q_BHQD, k_BKSD, v_BKSD, conditions(mask, len(q_BHQD)), how)
    return found


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, weighting: Weighting) -> None:
    rule = None
    if type(weighting) not in (Sparsemax, Entmax15):
        rule = f"it takes the weightings Sparsemax and Entmax15, not {type(weighting).__name__}"
    elif mask.shift is not None or mask.split or (mask.scope is not None and mask.window is None):
        rule = "it takes masks of whole sequences, without shift and split, whose scope is a window or None"
    elif mask.causal and q.shape[2] != k.shape[2]:
        rule = f"mask.causal needs as many queries as keys, not {q.shape[2]} and {k.shape[2]}"
    elif k.shape != v.shape or k.shape[3] != q.shape[3] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        rule = f"it takes keys and values as wide as queries, whose heads they divide, not {shapes}"
    elif q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        rule = f"it takes fp32, bf16 and fp16, the same for all, not {q.dtype}, {k.dtype}, {v.dtype}"
    elif q.shape[-1] > WIDEST:
        rule = f"it takes heads of at most {WIDEST}, not {q.shape[-1]}"
    if rule is not None:
        raise KernelUnavailable("sparse_weights", rule, "reference")


class _How(NamedTuple):
    """What an attention is about, beside its operands; `scale`: of z."""

    causal: bool
    power: int
    scale: float
    drop: Dropped | None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, seen, how):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        taus = q.new_empty(q.shape[:3], dtype=torch.float32)
        tiles, options = _options(WEIGHT_FORWARD, q, how)
        options["BY"] = common(q, k, v, out)
        grid = (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], tiles["M"]),)
        given = *map(heads, (q, k, v, out)), taus, seen, *_shared(q, k, how)
        with torch.cuda.device_of(q):
            kernels.sparse_weights_forward_kernel[grid](*given, PASSES=PASSES, **options)
        ctx.save_for_backward(q, k, v, taus)
        ctx.seen, ctx.how = seen, how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, taus = ctx.saved_tensors
        seen, how = ctx.seen, ctx.how
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        delta, d_q, d_k, d_v = (torch.empty_like(x) for x in (taus, q, k, v))
        operands = *map(heads, (q, k, v)), taus, heads(d_out), delta
        constants = {"BY": common(q, k, v, d_out, d_q, d_k, d_v), "C": columns(q.shape[-1], q.element_size())}
        with torch.cuda.device_of(q):
            tiles, options = _options(WEIGHT_QUERIES, q, how)
            grid = (q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], tiles["M"]),)
            given = *operands, heads(d_q), seen, *_shared(q, k, how)
            kernels.sparse_weights_query_kernel[grid](*given, **constants, **options)
            given = *operands, heads(d_k), heads(d_v), seen, *_shared(q, k, how)
            for of, which in key_launches(q.shape[-1]):
                tiles, options = _options(WEIGHT_KEYS, q, how, of=of)
                grid = (k.shape[0] * k.shape[1] * triton.cdiv(k.shape[2], tiles["N"]),)
                kernels.sparse_weights_key_kernel[grid](*given, **which, **constants, **options)
        return d_q, d_k, d_v, None, None


def _options(space: Space, q: Tensor, how: _How, **key: str) -> tuple[Any, dict[str, Any]]:
    """Sizes of tiles, and all constants that the three kernels share."""
    width = q.shape[-1]
    config = space.choose(q.device, width=padded(width), itemsize=q.element_size(), **key)
    constants = {"POWER": how.power, "CAUSAL": how.causal, "D": width, "W": padded(width)}
    return config.tiles, {**constants, **config.options}


def _shared(q: Tensor, k: Tensor, how: _How) -> tuple[Dropped | None, Sizes, float, int]:
    batch, count, queries, _ = q.shape
    return how.drop, Sizes(batch, count, queries, k.shape[2]), how.scale, count // k.shape[1]
