"""Dense attention in blocks of keys or queries, in plain PyTorch: memory grows with S, and dropout is exact.

The forward takes blocks of queries against the keys they may see. The backward takes blocks of keys, recomputes
the weights from the forward's log-sum-exp (Dao et al. 2022, algorithm 4) and holds them transposed, so that no
product needs a transposed copy of a large matrix.

Shapes: B batch, H query heads, K key/value heads, S sequence, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask, lower


def attention(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, dropout: WeightDropout | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(D)) V with `mask` and `dropout`; see `dense.reference`, its specification."""
    group = q_BHSD.shape[1] // k_BKSD.shape[1]
    k_BHSD, v_BHSD = (x if group == 1 else x.repeat_interleave(group, 1) for x in (k_BKSD, v_BKSD))
    drop = tuple(dropout) if dropout is not None else (0.0, None, None, None, 0)
    return _Blocks.apply(q_BHSD, k_BHSD, v_BHSD, mask.causal, mask.documents, *drop)


def block_rows(length: int) -> int:
    """Rows of a block: 128 suits the caches of CPUs; a long sequence gets 16 blocks, so that it compiles quickly."""
    return max(128, -(-length // (16 * 64)) * 64)


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, causal, documents, p, key, slots, positions, first_head):
        mask = Mask(causal, documents)
        drop = None if key is None else WeightDropout(p, key, slots, positions, first_head)
        if q.device.type == "cpu" and drop is None and documents is None:
            # PyTorch's own forward is good here, and gives the log-sum-exp; its bf16 backward is what is slow.
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
        else:
            out, lse = _forward(q, k, v, mask, drop)
        ctx.save_for_backward(q, k, v, out, lse, documents, key, slots, positions)
        ctx.causal, ctx.p, ctx.first_head = causal, p, first_head
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, documents, key, slots, positions = ctx.saved_tensors
        drop = None if key is None else WeightDropout(ctx.p, key, slots, positions, ctx.first_head)
        dq, dk, dv = _backward(d_out, q, k, v, out, lse, Mask(ctx.causal, documents), drop)
        return dq, dk, dv, *[None] * 7


def _forward(q, k, v, mask, drop):
    """Output [B, H, S, D] and log-sum-exp of the scores [B, H, S]."""
    length, rows = q.shape[2], block_rows(q.shape[2])
    outs, sums = [], []
    for start in range(0, length, rows):
        queries = slice(start, min(length, start + rows))
        keys = slice(0, queries.stop if mask.causal else length)
        scores = _scores(q[:, :, queries], k[:, :, keys].mT, q.shape[-1])
        seen = lower(mask, length, q.device, queries, keys)
        if seen is not None:
            scores = torch.where(seen, scores, -math.inf)
        weights = torch.softmax(scores, -1)
        if drop is not None:
            weights = torch.where(_kept(drop, q, queries, keys), weights * random.kept_scale(drop.p), 0)
        outs.append(weights.to(v.dtype) @ v[:, :, keys])
        sums.append(scores.logsumexp(-1))
    return torch.cat(outs, 2), torch.cat(sums, 2)


def _backward(d_out, q, k, v, out, lse, mask, drop):
    """Gradients of q, k, v [B, H, S, D]. Names ending in _T are transposed: keys (or features) by queries."""
    length, rows, wide = q.shape[2], block_rows(q.shape[2]), lse.dtype
    scale = 1 / math.sqrt(q.shape[-1])
    lse, delta = lse.unsqueeze(2), (d_out.to(wide) * out.to(wide)).sum(-1).unsqueeze(2)
    q_T, k_T, d_out_T = q.mT.contiguous(), k.mT.contiguous(), d_out.mT.contiguous()
    dks, dvs, pieces = [], [], []
    for start in range(0, length, rows):
        keys = slice(start, min(length, start + rows))
        queries = slice(start if mask.causal else 0, length)
        weights_T = torch.exp(_scores(k[:, :, keys], q_T[..., queries], q.shape[-1]) - lse[..., queries])
        seen = lower(mask, length, q.device, queries, keys)
        if seen is not None:
            weights_T = torch.where(seen.mT, weights_T, 0)
        d_weights_T = (v[:, :, keys] @ d_out_T[..., queries]).to(wide)
        dropped_T = weights_T
        if drop is not None:
            kept_T, factor = _kept(drop, q, queries, keys).mT, random.kept_scale(drop.p)
            dropped_T, d_weights_T = (torch.where(kept_T, x * factor, 0) for x in (weights_T, d_weights_T))
        d_scores_T = (weights_T * (d_weights_T - delta[..., queries])).to(q.dtype)
        dvs.append(dropped_T.to(v.dtype) @ d_out[:, :, queries])
        dks.append(d_scores_T @ q[:, :, queries])
        pieces.append((queries.start, k_T[..., keys] @ d_scores_T))
    dq_T = [
        sum(piece[..., a - first : a - first + rows].to(wide) for first, piece in pieces if first <= a)
        for a in range(0, length, rows)
    ]
    dq = (torch.cat(dq_T, -1).mT * scale).to(q.dtype)
    return dq, torch.cat(dks, 2) * scale, torch.cat(dvs, 2)


def _scores(left: Tensor, right: Tensor, dim: int) -> Tensor:
    scores = left @ right
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * (1 / math.sqrt(dim))


def _kept(drop: WeightDropout, q_BHSD: Tensor, queries: slice, keys: slice) -> Tensor:
    heads = torch.arange(q_BHSD.shape[1], device=q_BHSD.device) + drop.first_head
    coordinates = (drop.slots[:, None, None], heads[None, :, None], drop.positions[None, None, queries])
    return random.keep(drop.key, drop.p, coordinates, keys.stop, keys.start)
