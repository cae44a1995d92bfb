"""Two-level attention: over the tokens of one's own block, and over summaries of all other blocks, in one softmax.

The hierarchy of words and sentences of Yang et al. 2016 with blocks for sentences, in the two-level form of the
H-Transformer-1D (Zhu and Soricut 2021, section 4): a block is summarised by the means of its keys and values, and
weighs as many times as it has tokens, log(count) on its score. Where the keys of every block are equal the result is
that of dense attention. Earlier blocks alone, if causal; the work is O(n (block + n / block)).

Blocks are counted from the row's start, so packed documents are as separate ones where they begin at block
boundaries; elsewhere a block that several documents share is summarised over the query's document alone.

Shapes: B batch, H query heads, K key/value heads, S tokens, R rows, D head dimension, M summaries.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from headway.kernels.attention.content import strips
from headway.kernels.attention.content.pieces import (
    Blocks,
    documents_of,
    dropped,
    of_summaries,
    owned,
    seen_softmax,
    wide_scores,
)
from headway.kernels.attention.content.strips import Far, Strip, chunked
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
) -> Tensor:
    """Every token's key and value replaced, for queries of other blocks, by the means over the tokens of its block that
    the query sees; [B, H, S, D]. Arguments: `dense.reference`.

    Args:
        block: tokens of a block.
    """
    assert bias_HQK is None
    length = q_BHSD.shape[2]
    number = torch.arange(length, device=q_BHSD.device) // block
    same = number[:, None] == number
    documents = documents_of(mask, length, q_BHSD.device)
    together = (same & (documents[:, :, None] == documents[:, None]))[:, None].to(k_BKSD.dtype)
    together = together / together.sum(-1, keepdim=True)
    k_BHSD, v_BHSD = (per_query_head(x, q_BHSD) for x in (k_BKSD, v_BKSD))
    scores = wide_scores(q_BHSD, k_BHSD, scale)
    scores = torch.where(same, scores, wide_scores(q_BHSD, together @ k_BHSD, scale))
    within = lower(mask, length, length, q_BHSD.device)
    seen = torch.ones_like(same) if within is None else within
    weights = seen_softmax(scores, seen.expand_as(scores))
    if dropout is not None:
        near = dropped(weights, dropout, slice(None), slice(0, length))
        summaries = -(-length // block)
        columns = number + (number > number[:, None]) * summaries  # later blocks have columns of their own
        far = weights.new_ones(*weights.shape[:3], 2 * summaries)
        far = dropped(far, of_summaries(dropout), slice(None), slice(0, 2 * summaries))
        weights = torch.where(same, near, weights * far.gather(-1, columns.expand_as(weights)))
    weights = weights.to(v_BHSD.dtype)
    return (weights * same) @ v_BHSD + (weights * ~same) @ (together @ v_BHSD)


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
) -> Tensor:
    """The same with one key for each summary: rows in blocks, recomputed in the backward; O(S) held."""
    assert bias_HQK is None
    documents = documents_of(mask, q_BHSD.shape[2], q_BHSD.device)
    summaries = [owned(documents, block, last) for last in ([True] if mask.causal else [True, False])]
    k_BKML, v_BKML = (torch.cat([s.mean(x) for s in summaries], 2) for x in (k_BKSD, v_BKSD))

    def far(_, rows):
        known = rows.stop // block if mask.causal else k_BKML.shape[2]
        added = partial(_added, summaries, documents, rows, block, known)
        return Far(k_BKML[:, :, None, :known], v_BKML[:, :, None, :known], added)

    strip = Strip(block, 0, 0)
    parts = strips.cut(q_BHSD, strip, k_BKML.shape[2])
    return strips.attention(q_BHSD, k_BKSD, v_BKSD, mask, strip, _own_block, scale, dropout, far, parts=parts)


def _own_block(query: Tensor, key: Tensor) -> Tensor:
    """A strip is a block: all its keys."""
    return torch.ones_like(query == key)


def _added(summaries: list[Blocks], documents: Tensor, rows: slice, block: int, known: int) -> Tensor:
    """log(count) of the `known` summaries that each query sees, [B, T, c, L]: of earlier blocks, then of later ones."""
    number = torch.arange(summaries[0].owner_BM.shape[1], device=documents.device)
    own = torch.arange(rows.start // block, rows.stop // block, device=documents.device)[:, None, None]
    ours, found = chunked(documents, rows, block)[..., None], []
    for blocks, other in zip(summaries, (number < own, number > own), strict=False):
        seen = other & (ours == blocks.owner_BM[:, None, None])
        count = blocks.count_BM.clamp(min=1).double().log()[:, None, None]
        found.append(torch.where(seen, count, -torch.inf))
    return torch.cat(found, -1)[..., :known]
