"""Mixture of block attention (Lu et al. 2025, "MoBA: Mixture of Block Attention for Long-Context LLMs", section 2.2).

Every query attends to its own block (causally) and to the earlier blocks whose mean key it scores highest, in one
softmax; the own block counts among the `selected`. The choice has no gradient. Of equal scores earlier blocks win.

Blocks are counted from the row's start, so packed documents are as separate ones where they begin at block
boundaries; elsewhere the mean of a block that several documents share is over the query's document.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, M blocks, N blocks chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.content.pieces import (
    average,
    documents_of,
    owned,
    row_blocks,
    seen_softmax,
    wide_scores,
)
from headway.kernels.attention.content.select import attend, chosen, strongest
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask, lower


def reference(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    block: int,
    selected: int,
) -> Tensor:
    """Dense attention masked to the blocks chosen; [B, H, S, D]. Arguments: `dense.reference`.

    Args:
        block: tokens of a block.
        selected: blocks of a query, its own among them.
    """
    assert dropout is None
    weights = attention_weights(q_BHSD, k_BKSD, mask, scale, bias_HQK, block=block, selected=selected)
    return average(weights, v_BKSD, q_BHSD)


def attention_weights(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    block: int,
    selected: int,
) -> Tensor:
    """Weights [B, H, S, S]."""
    assert bias_HQK is None
    length = q_BHSD.shape[2]
    blocks, means = _summaries(k_BKSD, mask, block)
    index = _choice(q_BHSD, blocks, means, mask, selected, slice(0, length))
    among = chosen(index, -(-length // block)).repeat_interleave(block, -1)[..., :length]
    scores = wide_scores(q_BHSD, per_query_head(k_BKSD, q_BHSD), scale)
    seen = lower(mask, length, length, q_BHSD.device)
    assert seen is not None
    return seen_softmax(scores, among & seen)


def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    block: int,
    selected: int,
) -> Tensor:
    """The same by gathering blocks: O(S M D) for the choice and O(S N block D) for the attention."""
    assert dropout is None
    assert bias_HQK is None
    blocks, means = _summaries(k_BKSD, mask, block)
    rows = row_blocks(q_BHSD, means.shape[2])
    parts = [_choice(q_BHSD, blocks, means, mask, selected, part).int() for part in rows]
    return attend(q_BHSD, k_BKSD, v_BKSD, torch.cat(parts, 2), mask, scale, block)


@torch.no_grad()
def _summaries(k, mask, block):
    """Blocks of the keys and their means [B, K, M, D]."""
    blocks = owned(documents_of(mask, k.shape[2], k.device), block)
    return blocks, blocks.mean(k)


@torch.no_grad()
def _choice(q, blocks, means, mask, selected, rows):
    """Blocks of each query of `rows`, [B, H, R, N]; -1 for none."""
    documents, block = documents_of(mask, q.shape[2], q.device), blocks.counted_BMb.shape[-1]
    known = -(-rows.stop // block)  # no query of these rows sees the blocks after
    scores = wide_scores(q[:, :, rows], per_query_head(means[:, :, :known], q), 1.0)
    own = torch.arange(rows.start, rows.stop, device=q.device)[:, None] // block
    number = torch.arange(known, device=q.device)
    earlier = (number < own) & (documents[:, rows, None] == blocks.owner_BM[:, None, :known])
    scores = scores.masked_fill(number == own, torch.inf)
    return strongest(scores, (earlier | (number == own))[:, None], selected)
