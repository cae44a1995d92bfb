"""Attention of every query to blocks of keys that it selects: the choice, and the softmax over what is chosen.

The forward gathers blocks for some rows of queries at a time; the backward gathers them again and recomputes the
weights from the log-sum-exp, so that O(n) numbers and the choice are held, and the work is O(n N w) for N blocks of
w keys.

Shapes: B batch, H query heads, K key/value heads, I heads that choose (H, or K where a group chooses together),
G = H / I, Q queries, R rows of queries, S keys, D head dimension, M blocks, N blocks chosen, C = N w keys of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.content.pieces import ROWS, blocks_of
from headway.kernels.attention.dense import score_scale
from headway.kernels.attention.masks import Mask


def strongest(scores: Tensor, seen: Tensor, count: int) -> Tensor:
    """Places of the `count` highest scores that are seen, in ascending order; of equal ones the first.

    Args:
        scores, seen: [..., M]; `seen` broadcasts.
        count: how many.

    Returns:
        int64 [..., count], with -1 where fewer are seen.
    """
    missing, count = max(0, count - scores.shape[-1]), min(count, scores.shape[-1])
    scores = torch.where(seen, scores, -torch.inf)
    least = scores.topk(count, sorted=True).values[..., -1:]
    above, level = scores > least, scores == least
    room = count - above.sum(-1, keepdim=True)
    kept = (above | (level & (level.cumsum(-1, dtype=torch.int32) <= room))) & seen
    rank = torch.where(kept, kept.cumsum(-1, dtype=torch.int32) - 1, count).long()
    places = torch.arange(scores.shape[-1], device=scores.device).expand(rank.shape)
    index = torch.full((*rank.shape[:-1], count + 1), -1, device=scores.device)
    return F.pad(index.scatter_(-1, rank, places)[..., :count], (0, missing), value=-1)


def chosen(index: Tensor, total: int) -> Tensor:
    """Places [..., N] as a set: bool [..., total]; places below 0 are none."""
    marks = torch.zeros(*index.shape[:-1], total + 1, dtype=torch.bool, device=index.device)
    return marks.scatter_(-1, torch.where(index < 0, total, index), True)[..., :total]


def attend(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    index_BIQN: Tensor,
    mask: Mask,
    scale: float | None = None,
    width: int = 1,
    kept_BIQN: Tensor | None = None,
) -> Tensor:
    """Softmax attention over blocks of keys that each query chose, [B, H, Q, D].

    Args:
        index_BIQN: numbers of blocks, none twice, -1 for none; keys of them may be unseen.
        mask: causal and documents.
        scale: of the products; 1 / sqrt(D) if None.
        width: keys of a block.
        kept_BIQN: bool, blocks whose weights go into the sum, after the softmax; all if None.
    """
    assert mask.key_documents is None
    known = mask.documents, score_scale(scale, q_BHQD), width, mask.causal
    out: Tensor = _Selected.apply(q_BHQD, k_BKSD, v_BKSD, index_BIQN, kept_BIQN, *known)
    return out


class _Selected(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, index, kept, documents, scale, width, causal):
        ctx.known = scale, width, causal
        described = index.int(), kept, documents
        k_blocks, v_blocks = _flat(k, width), _flat(v, width)
        outs, sums = [], []
        for rows in _rows(index, k.shape[2], width):
            found, seen, used = _gathered(k, described, rows, width, causal)
            scores = _scores(q, _take(k_blocks, found, width), rows, index.shape[1], scale, seen)
            weights = torch.softmax(scores, -1)
            weights = torch.where(used, weights, 0).to(v.dtype)
            outs.append((weights @ _take(v_blocks, found, width)).transpose(2, 3).flatten(1, 2))
            sums.append(scores.logsumexp(-1).transpose(2, 3).flatten(1, 2))
        out, lse = torch.cat(outs, 2), torch.cat(sums, 2)
        ctx.save_for_backward(q, k, v, out, lse, *described)
        return out

    @staticmethod
    def backward(ctx, d_out):
        q, k, v, out, lse, *described = ctx.saved_tensors
        scale, width, causal = ctx.known
        heads = described[0].shape[1]
        k_blocks, v_blocks = _flat(k, width), _flat(v, width)
        dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (k_blocks, v_blocks))
        delta = (d_out.to(lse.dtype) * out.to(lse.dtype)).sum(-1, keepdim=True)
        dqs = []
        for rows in _rows(described[0], k.shape[2], width):
            found, seen, used = _gathered(k, described, rows, width, causal)
            keys, values = _take(k_blocks, found, width), _take(v_blocks, found, width)
            scores = _scores(q, keys, rows, heads, scale, seen)
            weights = torch.where(seen, torch.exp(scores - _of_rows(lse[..., None], rows, heads)), 0)
            asked = _of_rows(d_out, rows, heads)
            d_weights = torch.where(used, (asked @ values.mT).to(lse.dtype), 0)
            d_scores = (weights * (d_weights - _of_rows(delta, rows, heads)) * scale).to(q.dtype)
            dqs.append((d_scores @ keys).transpose(2, 3).flatten(1, 2))
            _add(dk, found, d_scores.mT @ _of_rows(q, rows, heads))
            _add(dv, found, torch.where(used, weights, 0).to(v.dtype).mT @ asked)
        return torch.cat(dqs, 2), _unflat(dk, k, width), _unflat(dv, v, width), *[None] * 6


def _rows(index, keys, width):
    """Blocks of rows: fewer where each query chooses much, so that what is gathered stays a multiple of the keys."""
    length, chosen_keys = index.shape[2], index.shape[3] * width
    rows = max(16, 16 * keys // chosen_keys)
    rows = min(ROWS, rows) if index.device.type == "cpu" else rows
    return (slice(start, min(length, start + rows)) for start in range(0, length, rows))


def _gathered(k, described, rows, width, causal):
    """For these rows, where their blocks are among all blocks [B, I, R, N], and which of the keys are seen, and which
    of these not dropped, [B, I, R, 1, C]."""
    index, kept, documents = described
    (batch, groups, length), blocks = k.shape[:3], blocks_of(k.shape[2], width)
    index = index[:, :, rows].long()
    owner = torch.arange(batch, device=k.device)[:, None] * groups + torch.arange(
        index.shape[1], device=k.device
    ) // (index.shape[1] // groups)
    place = (index[..., None] * width + torch.arange(width, device=k.device)).flatten(-2)
    seen = (place >= 0) & (place < length)
    if causal:
        seen &= place <= torch.arange(rows.start, rows.stop, device=k.device)[:, None]
    if documents is not None:
        theirs = documents[:, None, None].expand(*place.shape[:3], -1)
        theirs = theirs.gather(-1, place.clamp(0, length - 1))
        seen &= documents[:, None, rows, None] == theirs
    seen = seen.unsqueeze(3)
    used = seen
    if kept is not None:
        used = seen & kept[:, :, rows].repeat_interleave(width, -1).unsqueeze(3)
    return owner[..., None, None] * blocks + index.clamp(min=0), seen, used


def _of_rows(x_BHQD, rows, heads):
    """[B, I, R, G, D] of these rows."""
    return x_BHQD[:, :, rows].unflatten(1, (heads, -1)).transpose(2, 3)


def _scores(q, keys, rows, heads, scale, seen):
    scores = _of_rows(q, rows, heads) @ keys.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return torch.where(seen, scores, torch.finfo(scores.dtype).min)


def _flat(x_BKSD, width):
    """All blocks of all heads, [B K M, w D]."""
    padded = F.pad(x_BKSD, (0, 0, 0, -x_BKSD.shape[2] % width))
    return padded.reshape(-1, width * x_BKSD.shape[3])


def _unflat(blocks, like_BKSD, width):
    batch, groups, length, dim = like_BKSD.shape
    return blocks.view(batch, groups, -1, dim)[:, :, :length].to(like_BKSD.dtype)


def _take(blocks, found, width):
    """Keys (values) of the blocks found, [B, I, R, C, D]."""
    taken = blocks.index_select(0, found.flatten())
    return taken.view(*found.shape[:3], found.shape[3] * width, -1)


def _add(blocks, found, gradients):
    """Adds gradients [B, I, R, C, D] to those of the blocks found."""
    blocks.index_add_(0, found.flatten(), gradients.reshape(found.numel(), -1).to(blocks.dtype))
