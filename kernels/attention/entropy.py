"""Entropy of attention rows (Zhai et al. 2023, section 3), in blocks of queries: memory grows with S.

The entropy H = -sum p log p of p = softmax(s) has the gradient dH/ds = -p (log p + H): the backward recomputes p.
Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.blocks import block_rows
from headway.kernels.attention.dense import per_query_head, score_scale
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.slopes import Bias, block_of, flat, learned, restored


def row_entropy(
    q_BHQD: Tensor, k_BKSD: Tensor, mask: Mask, scale: float | None = None, bias_HQK: Bias | None = None
) -> Tensor:
    """Mean entropy of a sample's rows of dense attention, in nats: [B] in fp32 (fp64 for fp64), differentiable.

    The mean is over heads and over the queries that count: those that are not padding (a document below 0) and see
    a key; 0 if there are none. Dropout of weights does not take part. Arguments: see `dense.reference`.
    """
    rows_BHQ = every_row(q_BHQD, k_BKSD, mask, scale, bias_HQK)
    if mask.documents is None:
        return rows_BHQ.mean((1, 2))
    counts_BQ = mask.documents >= 0
    if mask.key_documents is not None:
        counts_BQ = counts_BQ & _some_key(mask, q_BHQD, k_BKSD)
    total_B = torch.where(counts_BQ[:, None], rows_BHQ, 0).sum((1, 2))
    return total_B / (counts_BQ.sum(1).clamp(min=1) * q_BHQD.shape[1])


def every_row(
    q_BHQD: Tensor, k_BKSD: Tensor, mask: Mask, scale: float | None = None, bias_HQK: Bias | None = None
) -> Tensor:
    """Entropy of every row, [B, H, Q]; 0 where nothing is seen. See `row_entropy`."""
    keys_BHSD = per_query_head(k_BKSD, q_BHQD)
    scale = score_scale(scale, q_BHQD)
    return _RowEntropy.apply(q_BHQD, keys_BHSD, learned(bias_HQK), scale, *mask, *flat(bias_HQK))


class _RowEntropy(torch.autograd.Function):
    """Entropy of every row, [B, H, Q]; 0 where nothing is seen."""

    @staticmethod
    def forward(
        ctx, q, k, bias, scale,
        causal, documents, key_documents, prefix, shift, split, scope,
        slopes, places,
    ):  # fmt: skip
        mask, rows = Mask(causal, documents, key_documents, prefix, shift, split, scope), []
        given = bias if slopes is None else restored(slopes, places, q.shape[2])
        for part in _parts(q, k, mask):
            p, log_p = _row_weights(q, k, given, scale, mask, *part)
            rows.append(-(p * log_p).sum(-1))
        entropy = torch.cat(rows, 2)
        described = documents, key_documents, prefix, slopes, places
        ctx.save_for_backward(q, k, bias, entropy, *described)
        ctx.scale, ctx.causal, ctx.shift, ctx.scope = scale, causal, shift, scope
        return entropy

    @staticmethod
    def backward(ctx, d_entropy):
        q, k, bias, entropy, *described = ctx.saved_tensors
        documents, key_documents, prefix, slopes, places = described
        given = bias if slopes is None else restored(slopes, places, q.shape[2])
        mask = Mask(ctx.causal, documents, key_documents, prefix, ctx.shift, scope=ctx.scope)
        wants_bias = ctx.needs_input_grad[2]
        dqs, d_biases, dk = [], [], torch.zeros_like(k, dtype=entropy.dtype)
        for queries, keys in _parts(q, k, mask):
            p, log_p = _row_weights(q, k, given, ctx.scale, mask, queries, keys)
            upstream, value = (x[:, :, queries, None] for x in (d_entropy, entropy))
            d_scores = -upstream * p * (log_p + value)
            before, after = keys.start, k.shape[2] - keys.stop
            if wants_bias:
                d_biases.append(F.pad(d_scores.sum(0), (before, after)))
            d_scores = (d_scores * ctx.scale).to(q.dtype)
            dqs.append(d_scores @ k[:, :, keys])
            dk = dk + F.pad(d_scores.mT @ q[:, :, queries], (0, 0, before, after))
        d_bias = torch.cat(d_biases, 1).to(bias.dtype) if wants_bias else None
        return torch.cat(dqs, 2), dk.to(k.dtype), d_bias, *[None] * 10


def _parts(q, k, mask):
    """Blocks of queries with the keys that they may see."""
    length, rows = q.shape[2], block_rows(q.shape[2])
    for start in range(0, length, rows):
        queries = slice(start, min(length, start + rows))
        yield queries, mask.keys_of(queries, k.shape[2])


def _row_weights(q, k, bias, scale, mask, queries, keys):
    """Weights and their logarithms, both 0 where a query does not see."""
    scores = q[:, :, queries] @ k[:, :, keys].mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if bias is not None:
        scores = scores + block_of(bias, queries, keys)
    seen = lower(mask, q.shape[2], k.shape[2], q.device, queries, keys)
    if seen is None:
        log_p = torch.log_softmax(scores, -1)
        return log_p.exp(), log_p
    log_p = torch.log_softmax(torch.where(seen, scores, torch.finfo(scores.dtype).min), -1)
    return torch.where(seen, log_p.exp(), 0), torch.where(seen, log_p, 0)


def _some_key(mask: Mask, q: Tensor, k: Tensor) -> Tensor:
    """Whether a query sees any key, bool [B, Q]."""
    blocks = (lower(mask, q.shape[2], k.shape[2], q.device, *part) for part in _parts(q, k, mask))
    return torch.cat([seen.any(-1)[:, 0] for seen in blocks if seen is not None], 1)
