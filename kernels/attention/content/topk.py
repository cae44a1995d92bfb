"""Attention of every query to its highest-scoring keys alone (Gupta et al. 2021, "Memory-efficient Transformers via
Top-k Attention", section 2).

The choice has no gradient: it flows through the scores that are kept. Of equal scores the earlier keys are kept, so
that a device's sorting decides nothing.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D head dimension, N keys kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.content.pieces import average, dropped, row_blocks, seen_softmax, wide_scores
from headway.kernels.attention.content.select import attend, strongest
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask, lower


def reference(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    selected: int,
) -> Tensor:
    """softmax over the `selected` largest of the scores that are seen; [B, H, Q, D]. Arguments: `dense.reference`."""
    weights = attention_weights(q_BHQD, k_BKSD, mask, scale, bias_HQK, selected=selected)
    weights = dropped(weights, dropout, slice(None), slice(0, k_BKSD.shape[2]))
    return average(weights, v_BKSD, q_BHQD)


def attention_weights(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    selected: int,
) -> Tensor:
    """Weights [B, H, Q, S]: of a query `selected` at most are not 0."""
    assert bias_HQK is None
    scores = wide_scores(q_BHQD, per_query_head(k_BKSD, q_BHQD), scale)
    seen = _seen(mask, q_BHQD, k_BKSD, slice(0, q_BHQD.shape[2]), slice(0, k_BKSD.shape[2]))
    order = scores.masked_fill(~seen, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :selected], True)
    return seen_softmax(scores, kept & seen)


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    selected: int,
) -> Tensor:
    """The same, holding the N keys that each query keeps: O(Q S D) for the choice, O(Q N D) for all that follows."""
    assert bias_HQK is None
    with torch.no_grad():
        index, kept = _choice(q_BHQD, k_BKSD, mask, dropout, scale, selected)
    # What is chosen is seen: the mask has nothing to add.
    out = attend(q_BHQD, k_BKSD, v_BKSD, index, Mask(False), scale, kept_BIQN=kept)
    return out if dropout is None else out * random.kept_scale(dropout.p)


def _choice(q, k, mask, dropout, scale, selected):
    """Keys kept by each query, int32 [B, H, Q, N], and which of their weights dropout leaves."""
    k_BHSD, chosen, kept = per_query_head(k, q), [], []
    for rows in row_blocks(q, k.shape[2]):
        keys = slice(0, rows.stop if mask.triangular else k.shape[2])
        scores = wide_scores(q[:, :, rows], k_BHSD[:, :, keys], scale)
        index = strongest(scores, _seen(mask, q, k, rows, keys), selected)
        if dropout is not None:
            left = dropout.kept(q.shape[1], rows, keys)
            kept.append(left.gather(-1, index.clamp(min=0)))
        chosen.append(index.int())
    return torch.cat(chosen, 2), torch.cat(kept, 2) if kept else None


def _seen(mask, q, k, rows, keys):
    seen = lower(mask, q.shape[2], k.shape[2], q.device, rows, keys)
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=q.device) if seen is None else seen
