"""Attention with logarithmic reads: a fine neighbourhood, and O(log n) summaries of ever longer spans of the rest.

The row is cut into chunks of `block` tokens, and these are the leaves of a binary tree: a span of level l has 2^l
chunks. A query in chunk t reads the tokens of chunks t and t - 1, and of each level l = 0, 1, ... with p = t >> l the
summary of span p - 2, and of span p - 3 where p is odd: together they hold every earlier token once, and no span is
longer than its distance. (The near field and far field of the H-Transformer-1D, Zhu and Soricut 2021, section 6, with
one key for each span, as the states of log-linear attention, Guo et al. 2025, section 3.) Both ways, the mirror image
follows: chunk t + 1, and spans p + 2, and p + 3 where p is even.

A summary is the means of the span's keys and values and weighs as many times as it has tokens, log(count) on its
score: where the keys of every span are equal the result is that of dense attention. All in one softmax.
O(n (block + log n)) work, O(n (1 + log n / block)) memory.

Chunks are counted from the row's start, so packed documents are as separate ones where they begin at multiples of the
longest span's length; elsewhere spans are cut elsewhere, and one that several documents share is summarised over the
query's document alone.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, T chunks, w tokens of a chunk, L reads of
a chunk, M spans of all levels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.content import strips
from headway.kernels.attention.content.pieces import (
    documents_of,
    dropped,
    of_summaries,
    owned,
    seen_softmax,
    wide_scores,
)
from headway.kernels.attention.content.strips import Far, Strip, chunked
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask


def reads(chunks: int, causal: bool, device: torch.device) -> list[tuple[int, bool, Tensor]]:
    """The reads of every chunk: (level, whether of the past, number of the span or -1, int64 [T]) for each column."""
    chunk, columns = torch.arange(chunks, device=device), []
    for level in range(max(0, (chunks - 1).bit_length() - 1)):
        p, spans = chunk >> level, -(-chunks >> level)
        columns += [(level, True, torch.where(p >= 2, p - 2, -1))]
        columns += [(level, True, torch.where((p >= 3) & (p % 2 == 1), p - 3, -1))]
        if not causal:
            after, beyond = p + 2, p + 3
            columns += [(level, False, torch.where(after < spans, after, -1))]
            columns += [(level, False, torch.where((beyond < spans) & (p % 2 == 0), beyond, -1))]
    return columns


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
    """The same column by column of `reads`, with every mean as a product with a matrix [S, S]; [B, H, S, D].

    Args:
        block: tokens of a chunk; a query sees its own chunk and the one before. Others: `dense.reference`.
    """
    assert bias_HQK is None
    length, device = q_BHSD.shape[2], q_BHSD.device
    k_BHSD, v_BHSD = (per_query_head(x, q_BHSD) for x in (k_BKSD, v_BKSD))
    place = torch.arange(length, device=device)
    chunk = place // block
    documents = documents_of(mask, length, device)
    near = ((chunk[:, None] - chunk).abs() <= 1) & (documents[:, :, None] == documents[:, None])[:, None]
    if mask.causal:
        near = near & (place[:, None] >= place)
    scores, seen, values = [wide_scores(q_BHSD, k_BHSD, scale)], [near], []
    for level, _, span in reads(-(-length // block), mask.causal, device):
        # The tokens of the span that a query reads, if any, of its own document: [B, 1, S, S].
        read = (chunk >> level) == span[chunk][:, None]
        read = (read & (documents[:, :, None] == documents[:, None]))[:, None]
        count = read.sum(-1, keepdim=True)
        mean = read.to(k_BHSD.dtype) / count.clamp(min=1)
        score = wide_scores(q_BHSD[..., None, :], (mean @ k_BHSD)[..., None, :], scale)[..., 0]
        scores.append(score + count.clamp(min=1).to(score.dtype).log())
        seen.append(count > 0)
        values.append(mean @ v_BHSD)
    together = torch.cat([s.expand(len(q_BHSD), -1, -1, -1) for s in seen], -1)
    weights = seen_softmax(torch.cat(scores, -1), together)
    tokens, spans = weights.split([length, weights.shape[-1] - length], -1)
    tokens = dropped(tokens, dropout, slice(None), slice(0, length)).to(v_BHSD.dtype)
    spans = dropped(spans, of_summaries(dropout), slice(None), slice(0, spans.shape[-1])).to(v_BHSD.dtype)
    return tokens @ v_BHSD + sum(spans[..., i, None] * value for i, value in enumerate(values))


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
    """The same with a tree of means, in strips that the backward recomputes."""
    assert bias_HQK is None
    length = q_BHSD.shape[2]
    documents, chunks = documents_of(mask, length, q_BHSD.device), -(-length // block)
    columns = reads(chunks, mask.causal, q_BHSD.device)
    k_BKTLD, v_BKTLD, owner_BTL, count_BTL = _summaries(k_BKSD, v_BKSD, documents, columns, block)
    strip = Strip(block, block, 0 if mask.causal else block)
    parts = strips.cut(q_BHSD, strip, len(columns))
    sizes = [-(-(p.stop - p.start) // block) for p in parts]
    k, v = k_BKTLD.split(sizes, 2), v_BKTLD.split(sizes, 2)
    owner, count = owner_BTL.split(sizes, 1), count_BTL.split(sizes, 1)

    def far(i, rows):
        return Far(k[i], v[i], partial(_added, count[i], owner[i], documents, rows, block))

    return strips.attention(
        q_BHSD, k_BKSD, v_BKSD, mask, strip, _whole_strip, scale, dropout, far, parts=parts
    )


def _added(count_BTL: Tensor, owner_BTL: Tensor, documents: Tensor, rows: slice, block: int) -> Tensor:
    """log(count) of the summaries that each query sees, [B, T, c, L]."""
    ours = chunked(documents, rows, block)[..., None]
    seen = (count_BTL > 0)[:, :, None] & (ours == owner_BTL[:, :, None])
    return torch.where(seen, count_BTL.clamp(min=1).double().log()[:, :, None], -torch.inf)


def _whole_strip(query: Tensor, key: Tensor) -> Tensor:
    """A strip is what its chunk sees: chunks whole."""
    return torch.ones_like(query == key)


def _summaries(k, v, documents, columns, block):
    """What each chunk reads: keys and values [B, K, T, L, D], their documents and counts [B, T, L]; 0 for none."""
    tables: dict[bool, list] = {}
    for past in dict.fromkeys(past for _, past, _ in columns):
        leaves = owned(documents, block, past)
        tables[past] = [(leaves.owner_BM, leaves.count_BM, leaves.sum(k), leaves.sum(v))]
        for _ in range(max(level for level, _, _ in columns)):
            tables[past].append(_parents(past, *tables[past][-1]))
    chunks, found = -(-documents.shape[1] // block), []
    for level, past, span in columns:
        owner, count, *sums = tables[past][level]
        at = span.clamp(min=0)
        number = count.clamp(min=1)[:, None, :, None]
        means = [(x / number).to(k.dtype).index_select(2, at) for x in sums]
        found.append((*means, owner[:, at], torch.where(span >= 0, count[:, at], 0)))
    if not found:
        empty = documents.new_zeros(len(documents), chunks, 0)
        return k.new_zeros(*k.shape[:2], chunks, 0, k.shape[3]), v.new_zeros(
            *v.shape[:2], chunks, 0, v.shape[3]
        ), empty, empty  # fmt: skip
    keys, values, owners, counts = zip(*found, strict=True)
    return torch.stack(keys, 3), torch.stack(values, 3), torch.stack(owners, -1), torch.stack(counts, -1)


def _parents(past, owner, count, k, v):
    """Owners, counts and sums of the next level. A parent's owner is that of its outer child (the later one, of the
    past); the other child's tokens join where it has the same."""
    pad = owner.shape[1] % 2
    owner = F.pad(owner, (0, pad), value=torch.iinfo(torch.int32).min).unflatten(1, (-1, 2))
    count = F.pad(count, (0, pad)).unflatten(1, (-1, 2))
    ours = owner[..., 1:] if past else owner[..., :1]
    joins = owner == ours
    sums = []
    for x in (k, v):
        pairs = F.pad(x, (0, 0, 0, pad)).unflatten(2, (-1, 2))
        sums.append((pairs * joins[:, None, ..., None]).sum(3))
    return ours[..., 0], (count * joins).sum(-1), *sums
