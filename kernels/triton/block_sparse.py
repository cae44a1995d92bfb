"""Softmax attention over the blocks that a scope leaves, by Triton kernels: what `dense.reference` gives under a mask
with a scope (Longformer, BigBird, strided, fixed, dilated; see `scopes`), without the empty tiles.

FlexAttention skips empty blocks as well, and is as good for a scope alone: prefer it where it compiles. This one drops
weights by global coordinates, so that masks are equal at any layout, needs no compilation by torch, and writes
gradients without atomics. `block_sparse_kernels` has the mathematics, `block_layout` the tiles.

Shapes: B batch, H query heads, K key heads, S places, D head dimension; M queries and N keys of a tile.
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
from headway.kernels.attention.scopes import Scope
from headway.kernels.attention.triton import WIDEST
from headway.kernels.triton import block_sparse_kernels as kernels
from headway.kernels.triton.attention_operands import common, dropped, heads, of_samples, padded
from headway.kernels.triton.attention_tiles import Dropped
from headway.kernels.triton.block_layout import Tiles, block_layout
from headway.kernels.triton.map_tiles import Sizes
from headway.kernels.triton.sparse_configs import (
    BLOCK_FORWARD,
    BLOCK_KEYS,
    BLOCK_QUERIES,
    columns,
    key_launches,
)
from headway.kernels.triton.tuning import Space

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@torch.compiler.disable  # Triton compiles the kernels itself
def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale Q K^T) V under a mask with a scope, [B, H, S, D]; see `dense.reference`, its specification.

    Rows that see nothing are 0. Gradients for queries, keys and values.

    Args:
        mask: of whole sequences: a scope, with or without causality and documents.
        dropout: of the weights, after the softmax.
        scale: factor of the products; 1 / sqrt(D) if None.

    Raises:
        KernelUnavailable: the mask, shapes or dtypes are not for these kernels.
    """
    _check(q_BHSD, k_BKSD, v_BKSD, mask)
    how = _How(mask.causal, mask.scope, score_scale(scale, q_BHSD), dropped(dropout))
    documents = of_samples(mask.documents, len(q_BHSD))
    found: Tensor = _Attention.apply(q_BHSD, k_BKSD, v_BKSD, documents, how)
    return found


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> None:
    rule = None
    if mask.scope is None:
        rule = "mask.scope is None: it computes blocks that a scope leaves"
    elif mask.prefix is not None or mask.shift is not None or mask.key_documents is not None or mask.split:
        rule = "it takes masks of whole sequences, without prefix, shift, split and key_documents"
    elif k.shape != v.shape or k.shape[2:] != q.shape[2:] or q.shape[1] % k.shape[1]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v))
        rule = f"it takes keys and values as long and wide as queries, whose heads they divide, not {shapes}"
    elif q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        rule = f"it takes fp32, bf16 and fp16, the same for all, not {q.dtype}, {k.dtype}, {v.dtype}"
    elif q.shape[-1] > WIDEST:
        rule = f"it takes heads of at most {WIDEST}, not {q.shape[-1]}"
    if rule is not None:
        raise KernelUnavailable("block_sparse", rule, "reference")


class _How(NamedTuple):
    """What an attention is about, beside its operands."""

    causal: bool
    scope: Scope | None
    scale: float
    drop: Dropped | None


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, documents, how):
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out = torch.empty_like(q)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        tiles, _, grid, options = _launch(BLOCK_FORWARD, q, q.shape[1], how)
        options["BY"] = common(q, k, v, out)
        given = *map(heads, (q, k, v, out)), lse, tiles, documents, *_shared(q, k, how)
        with torch.cuda.device_of(q):
            kernels.block_sparse_forward_kernel[grid](*given, **options)
        ctx.save_for_backward(q, k, v, documents, out, lse)
        ctx.how = how
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, documents, out, lse = ctx.saved_tensors
        how = ctx.how
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        delta, d_q, d_k, d_v = (torch.empty_like(x) for x in (lse, q, k, v))
        constants = {
            "BY": common(q, k, v, out, d_out, d_q, d_k, d_v),
            "C": columns(q.shape[-1], q.element_size()),
        }
        with torch.cuda.device_of(q):
            tiles, _, grid, options = _launch(BLOCK_QUERIES, q, q.shape[1], how)
            operands = *map(heads, (q, k, v, out)), lse, heads(d_out), delta, heads(d_q)
            given = *operands, tiles, documents, *_shared(q, k, how)
            kernels.block_sparse_query_kernel[grid](*given, **constants, **options)
            operands = *map(heads, (q, k, v)), lse, heads(d_out), delta, heads(d_k), heads(d_v)
            for of, which in key_launches(q.shape[-1]):
                _, tiles, grid, options = _launch(BLOCK_KEYS, q, k.shape[1], how, of=of)
                given = *operands, tiles, documents, *_shared(q, k, how)
                kernels.block_sparse_key_kernel[grid](*given, **which, **constants, **options)
        return d_q, d_k, d_v, None, None


def _launch(
    space: Space, q: Tensor, owners: int, how: _How, **key: str
) -> tuple[Tiles, Tiles, tuple[int], dict[str, Any]]:
    """Tiles by queries and by keys, grid, and constants of a kernel whose programs own blocks of so many heads: of
    queries, or with a key of keys."""
    batch, _, length, width = q.shape
    config = space.choose(q.device, width=padded(width), itemsize=q.element_size(), **key)
    tile = config.tiles["M"], config.tiles["N"]
    assert how.scope is not None
    layout = block_layout(how.causal, how.scope, length, tile, q.device)
    programs = batch * owners * triton.cdiv(length, tile[bool(key)])
    return *layout, (programs,), {"D": width, "W": padded(width), **config.options}


def _shared(q: Tensor, k: Tensor, how: _How) -> tuple[Dropped | None, Sizes, float, int]:
    batch, count, length, _ = q.shape
    return how.drop, Sizes(batch, count, length, length), how.scale, count // k.shape[1]
