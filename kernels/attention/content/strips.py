"""Attention to what is near, and to summaries of what is far, in one softmax: rows in chunks that see the same strip.

A chunk of queries reads the keys of its own places with some before and after: a strip. Several chunks are computed
together as a batch, about `pieces.ROWS` queries at a time, and computed again in the backward: O(n) is held, and no
product is larger than the strips are.

Shapes: B batch, H query heads, K key/value heads, G = H / K, S tokens, T chunks computed together, c tokens of a chunk,
W keys of a strip, L summaries, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.content.pieces import ROWS, of_summaries, recomputed, row_blocks, seen_softmax
from headway.kernels.attention.dense import WeightDropout, score_scale
from headway.kernels.attention.masks import Mask


class Strip(NamedTuple):
    """Keys of a chunk: those of its `width` places, `before` more and `after` more."""

    width: int
    before: int
    after: int

    @property
    def keys(self) -> int:
        return self.before + self.width + self.after


class Far(NamedTuple):
    """Summaries that some rows read beside their strips.

    Attributes:
        k, v: [B, K, T, L, D] for each chunk its own, or [B, K, 1, L, D] for all.
        added: gives what is added to scores, [B, T, c, L]: -inf where a query does not see a summary; B may be 1. It is
            called when it is needed, so that none is held for the backward.
    """

    k: Tensor
    v: Tensor
    added: Callable[[], Tensor]


def within(window: int, causal: bool) -> Strip:
    """Strips that hold all keys less than `window` places away."""
    return Strip(min(window, ROWS), window - 1, 0 if causal else window - 1)


def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    strip: Strip,
    sees: Callable[[Tensor, Tensor], Tensor],
    scale: float | None = None,
    dropout: WeightDropout | None = None,
    far: Callable[[int, slice], Far] | None = None,
    soft: Callable[..., Tensor] | None = None,
    learned: Sequence[Tensor] = (),
    parts: list[slice] | None = None,
) -> Tensor:
    """Softmax attention of each chunk to its strip, and to summaries; [B, H, S, D].

    Args:
        mask: causal and documents; queries and keys are as many.
        sees: (places of queries [T, c, 1], of keys [T, 1, W]) -> bool, which keys a query sees by their places.
        scale: of the products; 1 / sqrt(D) if None.
        dropout: of the weights, by coordinates; summaries are columns of their own.
        far: (number of the part, rows) -> what these rows, whole chunks, read beside.
        soft: (distances [T, c, W], *learned) -> factors of the weights [H, T, c, W], which are then normalised again.
        learned: what `soft` reads and has a gradient.
        parts: rows to compute at a time, from `cut`.
    """
    assert far is None or soft is None
    length, width = q_BHSD.shape[2], strip.width
    parts = parts or cut(q_BHSD, strip)
    sizes, outs = [p.stop - p.start for p in parts], []
    q, k, v = (F.pad(x, (0, 0, 0, -length % width)).split(sizes, 2) for x in (q_BHSD, k_BKSD, v_BKSD))
    for i, rows in enumerate(parts):
        here = _Part(mask, strip, sees, score_scale(scale, q_BHSD), dropout, soft, rows, length)
        k_near, v_near = (around(x, i, strip.before, strip.after) for x in (k, v))
        beside = far(i, rows) if far else None
        if beside is None:
            outs.append(recomputed(here.attend, q[i], k_near, v_near, *learned))
        else:
            compute = here._replace(added=beside.added).attend
            outs.append(recomputed(compute, q[i], k_near, v_near, beside.k, beside.v))
    return torch.cat(outs, 2)[:, :, :length]


def cut(q_BHSD: Tensor, strip: Strip, summaries: int = 0) -> list[slice]:
    """Rows to compute at a time, whole chunks, where each also reads so many summaries."""
    length = q_BHSD.shape[2]
    return row_blocks(q_BHSD, strip.keys + summaries, strip.width, length + -length % strip.width)


def around(pieces: Sequence[Tensor], i: int, before: int, after: int) -> Tensor:
    """Piece i of a sequence [B, K, S, D] that is cut along S, with places of those beside it; zeros beyond the ends."""
    found = [pieces[i]]
    for piece in reversed(pieces[:i]):
        if before == 0:
            break
        found.insert(0, piece[:, :, -before:])
        before -= found[0].shape[2]
    for piece in pieces[i + 1 :]:
        if after == 0:
            break
        found.append(piece[:, :, :after])
        after -= found[-1].shape[2]
    return F.pad(torch.cat(found, 2), (0, 0, before, after))


def chunked(documents_BS: Tensor, rows: slice, width: int) -> Tensor:
    """Documents of rows that are whole chunks, [B, T, c]; places beyond the sequence have that of the last token."""
    places = torch.arange(rows.start, rows.stop, device=documents_BS.device)
    return documents_BS[:, places.clamp(max=documents_BS.shape[1] - 1)].unflatten(1, (-1, width))


class _Part(NamedTuple):
    """What some rows need to know; see `attention`."""

    mask: Mask
    strip: Strip
    sees: Callable[[Tensor, Tensor], Tensor]
    scale: float
    dropout: WeightDropout | None
    soft: Callable[..., Tensor] | None
    rows: slice
    length: int
    added: Callable[[], Tensor] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *more: Tensor) -> Tensor:
        """Rows [B, H, T c, D] against keys [B, K, before + T c + after, D], and what is far or learned."""
        width, groups = self.strip.width, k.shape[1]
        asked = q.unflatten(2, (-1, width)).unflatten(1, (groups, -1)).transpose(2, 3)  # [B, K, T, G, c, D]
        k_KTWD, v_KTWD = (x.unfold(2, self.strip.keys, width).mT for x in (k, v))
        query, key = self._places(q.device)
        scores = [_products(asked, k_KTWD, self.scale)]
        seen = [self._seen(query, key)[:, None, :, None]]
        values = [v_KTWD]
        if self.added is not None:
            added = self.added()[:, None, :, None].to(scores[0].dtype)
            seen.append(added > -torch.inf)
            scores.append(_products(asked, more[0], self.scale) + torch.where(seen[-1], added, 0))
            values.append(more[1])
        together = torch.cat([x.expand(len(q), 1, -1, 1, -1, -1) for x in seen], -1)
        weights = seen_softmax(torch.cat(scores, -1), together)
        if self.soft is not None:
            factors = self.soft((query - key).abs().to(weights.dtype), *more)
            weights = weights * factors.unflatten(0, (groups, -1)).transpose(1, 2)
            weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        split = list(weights.split([x.shape[-1] for x in scores], -1))
        if self.dropout is not None:
            split = [
                torch.where(kept.unflatten(1, (groups, -1)).transpose(2, 3), w, 0)
                * random.kept_scale(self.dropout.p)
                for w, kept in zip(split, self._kept(q.shape[1], [w.shape[-1] for w in split]), strict=False)
            ]
        out = sum(_averages(w, x) for w, x in zip(split, values, strict=True))
        return out.transpose(2, 3).flatten(1, 2).flatten(2, 3)

    def _places(self, device: Any) -> tuple[Tensor, Tensor]:
        """Places of queries [T, c, 1] and of keys [T, 1, W]; those of keys may lie beyond the ends."""
        query = torch.arange(self.rows.start, self.rows.stop, device=device).unflatten(
            0, (-1, self.strip.width)
        )
        key = query[:, :1] - self.strip.before + torch.arange(self.strip.keys, device=device)
        return query[..., None], key[:, None]

    def _seen(self, query: Tensor, key: Tensor) -> Tensor:
        """Which keys are seen, [B or 1, T, c, W]."""
        seen = (self.sees(query, key) & (key >= 0) & (key < self.length))[None]
        if self.mask.causal:
            seen = seen & (key <= query)
        documents = self.mask.documents
        if documents is not None:
            theirs = documents[:, key.clamp(0, self.length - 1)]
            seen = seen & (documents[:, query.clamp(max=self.length - 1)] == theirs)
        return seen

    def _kept(self, heads: int, columns: list[int]) -> Iterator[Tensor]:
        """Weights that dropout leaves, [B, H, T, c, W], then of summaries [B, H, T, c, L]."""
        assert self.dropout is not None
        (_, before, after), rows = self.strip, self.rows
        real = slice(rows.start, min(rows.stop, self.length))
        keys = slice(max(0, rows.start - before), rows.stop + after)
        missing = rows.stop - real.stop
        for number, count in enumerate(columns):
            dropout = of_summaries(self.dropout) if number else self.dropout
            assert dropout is not None
            kept = dropout.kept(heads, real, slice(0, count) if number else keys)
            kept = F.pad(kept, (0, 0, 0, missing)).unflatten(2, (-1, self.strip.width))
            if number == 0:
                kept = F.pad(kept, (keys.start - (rows.start - before), 0))
                first = torch.arange(kept.shape[2], device=kept.device) * self.strip.width
                own = first[:, None] + torch.arange(count, device=kept.device)
                kept = kept.gather(-1, own[:, None].expand(*kept.shape[:4], -1))
            yield kept


def _products(q_BKTGcD, k_BKTLD, scale):
    """Scaled products [B, K, T, G, c, L] in fp32 (fp64 for fp64)."""
    group, width = q_BKTGcD.shape[3:5]
    rows = q_BKTGcD.flatten(3, 4)
    if k_BKTLD.shape[2] == 1:  # the same keys for all chunks: one product
        scores = (rows.flatten(2, 3) @ k_BKTLD[:, :, 0].mT).unflatten(2, rows.shape[2:4])
    else:
        scores = rows @ k_BKTLD.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    return scores.unflatten(3, (group, width))


def _averages(weights, v_BKTLD):
    """Weighted sums of values, [B, K, T, G, c, D]."""
    group, width = weights.shape[3:5]
    rows = weights.to(v_BKTLD.dtype).flatten(3, 4)
    if v_BKTLD.shape[2] == 1:
        sums = (rows.flatten(2, 3) @ v_BKTLD[:, :, 0]).unflatten(2, rows.shape[2:4])
    else:
        sums = rows @ v_BKTLD
    return sums.unflatten(3, (group, width))
