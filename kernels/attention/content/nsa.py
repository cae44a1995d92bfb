"""Native sparse attention (Yuan et al. 2025, "Native Sparse Attention", section 3): three branches with gates.

    y = g_1 compressed + g_2 selected + g_3 window,   g = sigmoid of a projection of x    (equation 5)

- compressed: the blocks of `block` tokens that have ended, each by one key and one value phi(K), phi(V) (equation 7).
- selected: the tokens of the `selected` blocks that the compressed branch weighs most, summed over the query heads of
  a key/value head, which choose together (equations 9 to 12). The first block, the query's own and the one before
  count among them and always are (section 4.1). The choice has no gradient.
- window: the last `window` tokens.

The paper's phi is a learned MLP with positions inside the block, not written out. Here it acts on tokens and is added
to the mean: phi(K) = mean_j(k_j) + mean_j(gelu((k_j + p_j) U)) W, which is the plain mean where W is 0.
Compressed and selected blocks are the same and do not overlap. Blocks are counted from the row's start, so packed
documents are as separate ones where they begin at block boundaries; elsewhere a block that several documents share
stands for the query's document alone, and the "first" block is the one in which the document begins.

Shapes: B batch, H query heads, K key/value heads, S tokens, R rows, D head dimension, b block, M blocks, N chosen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention import dense
from headway.kernels.attention.content import strips
from headway.kernels.attention.content.pieces import (
    Blocks,
    average,
    documents_of,
    in_blocks,
    owned,
    recomputed,
    row_blocks,
    seen_softmax,
    wide_scores,
)
from headway.kernels.attention.content.select import attend, chosen, strongest
from headway.kernels.attention.content.strips import within
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import Window


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
    window: int,
    gate: Tensor,
    key_positions: Tensor,
    key_up: Tensor,
    key_down: Tensor,
    value_positions: Tensor,
    value_up: Tensor,
    value_down: Tensor,
) -> Tensor:
    """The three branches by dense masks; [B, H, S, D]. Arguments: `dense.reference`.

    Args:
        block: tokens of a block.
        selected: blocks of a query, at least the three that always are.
        window: tokens of the window.
        gate: [B, H, S, 3], before the sigmoid, in the order of the branches.
        key_positions, value_positions: [K, b, D], p above.
        key_up, key_down, value_up, value_down: [K, D, D], U and W above.
    """
    assert dropout is None
    assert bias_HQK is None
    length = q_BHSD.shape[2]
    blocks, rows = owned(documents_of(mask, length, q_BHSD.device), block), slice(0, length)
    k_BKMD = compress(k_BKSD, blocks, key_positions, key_up, key_down)
    v_BKMD = compress(v_BKSD, blocks, value_positions, value_up, value_down)
    compressed = _compressed(q_BHSD, k_BKMD, v_BKMD, _ended(mask, blocks, rows, length), scale)

    index = _choice(q_BHSD, k_BKMD, mask, blocks, scale, selected, rows)
    among = chosen(index, k_BKMD.shape[2]).repeat_interleave(block, -1)[..., :length]
    scores = wide_scores(q_BHSD, per_query_head(k_BKSD, q_BHSD), scale)
    seen = lower(mask, length, length, q_BHSD.device)
    assert seen is not None
    picked = average(seen_softmax(scores, per_query_head(among, q_BHSD) & seen), v_BKSD, q_BHSD)

    near = dense.reference(q_BHSD, k_BKSD, v_BKSD, mask._replace(scope=Window(window)), None, scale)
    return _gated(gate, compressed, picked, near)


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
    window: int,
    gate: Tensor,
    key_positions: Tensor,
    key_up: Tensor,
    key_down: Tensor,
    value_positions: Tensor,
    value_up: Tensor,
    value_down: Tensor,
) -> Tensor:
    """The same in O(S (M + N b + window) D): rows in blocks, chosen blocks gathered once for a group of heads."""
    assert dropout is None
    assert bias_HQK is None
    length = q_BHSD.shape[2]
    blocks = owned(documents_of(mask, length, q_BHSD.device), block)
    k_BKMD = compress(k_BKSD, blocks, key_positions, key_up, key_down)
    v_BKMD = compress(v_BKSD, blocks, value_positions, value_up, value_down)
    outs, index = [], []
    for rows, q_BHRD in _parts(q_BHSD, k_BKMD.shape[2]):

        def attend_to_blocks(q, k, v, rows=rows):
            return _compressed(q, k, v, _ended(mask, blocks, rows, length), scale)

        known = max(1, rows.stop // block)  # no query of these rows sees the blocks after
        outs.append(recomputed(attend_to_blocks, q_BHRD, k_BKMD[:, :, :known], v_BKMD[:, :, :known]))
        index.append(_choice(q_BHRD, k_BKMD, mask, blocks, scale, selected, rows).int())
    picked = attend(q_BHSD, k_BKSD, v_BKSD, torch.cat(index, 2), mask, scale, block)
    strip, near_by = within(window, mask.causal), Window(window)
    near = strips.attention(
        q_BHSD, k_BKSD, v_BKSD, mask, strip, lambda q, k: near_by.sees(q, k, length, True), scale
    )
    return _gated(gate, torch.cat(outs, 2), picked, near)


def compress(
    x_BKSD: Tensor, blocks: Blocks, positions_KbD: Tensor, up_KDD: Tensor, down_KDD: Tensor
) -> Tensor:
    """phi: one vector for each block, [B, K, M, D], of the tokens that the block counts."""
    length, width = x_BKSD.shape[2], positions_KbD.shape[1]
    placed = (in_blocks(x_BKSD, width) + positions_KbD[:, None].to(x_BKSD.dtype)).flatten(2, 3)[:, :, :length]
    hidden = F.gelu(placed @ up_KDD.to(x_BKSD.dtype))
    return blocks.mean(x_BKSD) + blocks.mean(hidden) @ down_KDD.to(x_BKSD.dtype)


def _parts(q_BHSD, blocks):
    """Blocks of rows with their queries, cut once: the backward then joins them once."""
    rows = row_blocks(q_BHSD, blocks)
    return zip(rows, q_BHSD.split([r.stop - r.start for r in rows], 2), strict=True)


def _ended(mask, blocks, rows, length):
    """Which blocks have ended at a query and are of its document, bool [B or 1, 1, R, M]."""
    device = blocks.owner_BM.device
    documents = documents_of(mask, length, device)[:, rows]
    places = torch.arange(rows.start, rows.stop, device=device)
    width = blocks.counted_BMb.shape[-1]
    number = torch.arange(blocks.owner_BM.shape[1], device=device)
    ended = (number + 1) * width - 1 <= places[:, None]
    return (ended & (documents[..., None] == blocks.owner_BM[:, None]))[:, None]


def _compressed(q, k_BKMD, v_BKMD, ended, scale):
    scores = wide_scores(q, per_query_head(k_BKMD, q), scale)
    return average(seen_softmax(scores, ended[..., : scores.shape[-1]]), v_BKMD, q)


@torch.no_grad()
def _choice(q, k_BKMD, mask, blocks, scale, selected, rows):
    """Blocks that a group of query heads selects, [B, K, R, N]."""
    heads, width = k_BKMD.shape[1], blocks.counted_BMb.shape[-1]
    known = -(-rows.stop // width)  # no query of these rows sees the blocks after
    scores = wide_scores(q, per_query_head(k_BKMD[:, :, :known], q), scale)
    documents = documents_of(mask, blocks.counted_BMb[0].numel(), q.device)
    seen = _ended(mask, blocks, rows, documents.shape[1])[..., :known]
    weights = seen_softmax(scores, seen).unflatten(1, (heads, -1)).mean(2)
    own = torch.arange(rows.start, rows.stop, device=q.device)[:, None] // width
    first = _begins(documents)[:, rows, None] // width
    number = torch.arange(weights.shape[-1], device=q.device)
    always = [number == first, (number == own - 1) & (number >= first), number == own]
    for worth, which in enumerate(always, 2):  # above any weight, the own block first
        weights = torch.where(which.expand(len(first), -1, -1)[:, None], worth, weights)
        seen = seen | which.expand(len(first), -1, -1)[:, None]
    return strongest(weights, seen, selected)


def _begins(documents_BS):
    """Where the document of each token begins, int64 [B, S]."""
    places = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    fresh = F.pad(documents_BS[:, 1:] != documents_BS[:, :-1], (1, 0), value=True)
    return torch.where(fresh, places, 0).cummax(1).values


def _gated(gate_BHS3, *branches):
    gates = gate_BHS3.sigmoid().to(branches[0].dtype)
    return sum(gates[..., i, None] * branch for i, branch in enumerate(branches))
