"""Dense attention in blocks of keys or queries, in plain PyTorch: memory grows with S, and dropout is exact.

The forward takes blocks of queries against the keys they may see. The backward takes blocks of keys, recomputes
the weights from the forward's log-sum-exp (Dao et al. 2022, algorithm 4) and holds them transposed, so that no
product needs a transposed copy of a large matrix.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.slopes import Bias, block_of, flat, learned, restored


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
) -> Tensor:
    """softmax(scale Q K^T + bias) V with `mask` and `dropout`; see `dense.reference`, its specification."""
    k_BHSD, v_BHSD = (per_query_head(x, q_BHQD) for x in (k_BKSD, v_BKSD))
    drop = tuple(dropout) if dropout is not None else (0.0, None, None, None, 0, 0)
    operands = q_BHQD, k_BHSD, v_BHSD, learned(bias_HQK), score_scale(scale, q_BHQD)
    return _Blocks.apply(*operands, *mask, *drop, *flat(bias_HQK))


ROWS = 128


def block_rows(length: int) -> int:
    """Rows of a block at most: 128 suits the caches of CPUs; compiled, a long sequence gets 16 blocks, so that it
    compiles quickly."""
    return max(ROWS, -(-length // (16 * 64)) * 64)


def _rows(length: int) -> int:
    return block_rows(length) if torch.compiler.is_compiling() else ROWS


_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _has_flash(q: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's flash kernel for CPUs computes these: it has none for values of another width than queries."""
    return q.device.type == "cpu" and q.shape[-1] == v.shape[-1]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q, k, v, bias, scale,
        causal, documents, key_documents, prefix, shift, split, scope,
        p, key, slots, positions, first_head, first_key,
        slopes, places,
    ):  # fmt: skip
        mask = Mask(causal, documents, key_documents, prefix, shift, split, scope)
        drop = None if key is None else WeightDropout(p, key, slots, positions, first_head, first_key)
        given = bias if slopes is None else restored(slopes, places, q.shape[2])
        out, lse = outputs(q, k, v, given, scale, mask, drop)
        described = documents, key_documents, prefix, key, slots, positions, slopes, places
        ctx.save_for_backward(q, k, v, bias, out, lse, *described)
        ctx.scale, ctx.causal, ctx.shift, ctx.scope, ctx.p = scale, causal, shift, scope, p
        ctx.first_head, ctx.first_key = first_head, first_key
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, bias, out, lse, *described = ctx.saved_tensors
        documents, key_documents, prefix, key, slots, positions, slopes, places = described
        mask = Mask(ctx.causal, documents, key_documents, prefix, ctx.shift, scope=ctx.scope)
        where = slots, positions, ctx.first_head, ctx.first_key
        drop = None if key is None else WeightDropout(ctx.p, key, *where)
        wants_bias = ctx.needs_input_grad[3]
        given = bias if slopes is None else restored(slopes, places, q.shape[2])
        return *gradients(d_out, q, k, v, given, out, lse, ctx.scale, mask, drop, wants_bias), *[None] * 16


def outputs(q, k, v, bias, scale, mask, drop):
    """Output [B, H, Q, D] and log-sum-exp of the scores [B, H, Q], for as many keys' heads as queries'."""
    whole = mask.documents is None and mask.prefix is None and mask.shift is None
    plain = whole and mask.scope is None and bias is None
    if _has_flash(q, v) and drop is None and plain:
        # PyTorch's own forward is good here, and gives the log-sum-exp; its bf16 backward is what is slow.
        return _flash(q, k, v, 0.0, mask.causal, scale=scale)
    length, total, rows = q.shape[2], k.shape[2], _rows(q.shape[2])
    outs, sums = [], []
    for start in range(0, length, rows):
        queries = slice(start, min(length, start + rows))
        keys = mask.keys_of(queries, total)
        out, lse = _attend(q, k, v, bias, scale, mask, drop, queries, keys)
        outs.append(out)
        sums.append(lse)
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _attend(q, k, v, bias, scale, mask, drop, queries, keys):
    """Output and log-sum-exp of a block of queries."""
    seen = lower(mask, q.shape[2], k.shape[2], q.device, queries, keys)
    q_part, k_part, v_part = q[:, :, queries], k[:, :, keys], v[:, :, keys]
    if _has_flash(q, v) and drop is None and bias is not None and not torch.compiler.is_compiling():
        # A bias costs another pass over the scores, which PyTorch's kernel does not need: a third of the time.
        # Compiled, the pass is fused with the others, and PyTorch's kernel is the slower one.
        added = block_of(bias, queries, keys)[None]
        added = added if seen is None else torch.where(seen, added, -math.inf)
        wide = torch.promote_types(q.dtype, torch.float32)
        out, lse = _flash(q_part, k_part, v_part, 0.0, False, attn_mask=added.to(wide), scale=scale)
        if (
            seen is not None and mask.may_hide_all
        ):  # the kernel's log-sum-exp of no keys at all is not to be used
            lse = torch.where(seen.any(-1), lse, torch.finfo(lse.dtype).min)
        return out, lse
    scores = _scores(q_part, k_part.mT, scale)
    if bias is not None:
        scores += block_of(bias, queries, keys)
    if seen is not None:
        scores = torch.where(seen, scores, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    if seen is not None and mask.may_hide_all:  # a row may see nothing
        weights = torch.where(seen, weights, 0)
    if drop is not None:
        weights = torch.where(drop.kept(q.shape[1], queries, keys), weights, 0)
    out = weights.to(v.dtype) @ v_part
    return out if drop is None else out * random.kept_scale(drop.p), scores.logsumexp(-1)


def gradients(d_out, q, k, v, bias, out, lse, scale, mask, drop, wants_bias):
    """Gradients of q, k, v and of the bias. Names ending in _T are transposed: keys (or features) by queries.

    Where these keys are a part of those that a query sees, `out` and `lse` are those of all of them.
    """
    length, total, rows, wide = q.shape[2], k.shape[2], _rows(k.shape[2]), lse.dtype
    lse, delta = lse.unsqueeze(2), (d_out.to(wide) * out.to(wide)).sum(-1).unsqueeze(2)
    if drop is not None:  # what is kept is scaled here, and not in every weight
        d_out = d_out * random.kept_scale(drop.p)
    q_T, k_T, d_out_T = q.mT.contiguous(), k.mT.contiguous(), d_out.mT.contiguous()
    dks, dvs, d_biases, pieces = [], [], [], []
    for start in range(0, total, rows):
        keys = slice(start, min(total, start + rows))
        queries = mask.queries_of(keys, length, rows)
        scores_T = _scores(k[:, :, keys], q_T[..., queries], scale)
        if bias is not None:
            scores_T += block_of(bias, queries, keys).mT
        weights_T = scores_T.sub_(lse[..., queries]).exp_()
        seen = lower(mask, length, total, q.device, queries, keys)
        if seen is not None:
            weights_T = torch.where(seen.mT, weights_T, 0)
        d_weights_T = (v[:, :, keys] @ d_out_T[..., queries]).to(wide)
        dropped_T = weights_T
        if drop is not None:
            kept_T = drop.kept(q.shape[1], queries, keys).mT
            dropped_T, d_weights_T = (torch.where(kept_T, x, 0) for x in (weights_T, d_weights_T))
        d_scores_T = d_weights_T.sub_(delta[..., queries]).mul_(weights_T)
        if wants_bias:
            d_biases.append(F.pad(d_scores_T.sum(0), (queries.start, length - queries.stop)).mT)
        d_scores_T = d_scores_T.to(q.dtype)
        dvs.append(dropped_T.to(v.dtype) @ d_out[:, :, queries])
        dks.append(d_scores_T @ q[:, :, queries])
        pieces.append((queries, k_T[..., keys] @ d_scores_T))
    dq_T = [_of_block(pieces, a, rows, q_T, wide) for a in range(0, length, rows)]
    dq = (torch.cat(dq_T, -1).mT * scale).to(q.dtype)
    d_bias = torch.cat(d_biases, 2).to(bias.dtype) if wants_bias else None
    return dq, torch.cat(dks, 2) * scale, torch.cat(dvs, 2), d_bias


def _of_block(pieces, start, rows, like_T, wide):
    """Sum of what blocks of keys gave for a block of queries; some see none of them."""
    found = [
        piece[..., start - queries.start : start - queries.start + rows].to(wide)
        for queries, piece in pieces
        if queries.start <= start < queries.stop
    ]
    return sum(found) if found else torch.zeros_like(like_T[..., start : start + rows], dtype=wide)


def _scores(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Scaled products in a tensor of its own, which may be written to."""
    scores = left @ right
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if scale == 1 else scores.mul_(scale)
