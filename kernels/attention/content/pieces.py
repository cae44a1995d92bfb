"""What mechanisms that work by blocks share: rows in blocks, softmax of what is seen, recomputation.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, D head dimension, M blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.masks import Mask

ROWS = 128
"""Queries of a block of rows at least: they suit the caches of CPUs."""
_MANY = 2**25
"""Scores that keep a GPU busy for longer than it takes to start what computes them."""

_NOBODY = torch.iinfo(torch.int32).min  # the document of places beyond the sequence


def row_blocks(q_BHSD: Tensor, keys: int, multiple: int = 1, length: int | None = None) -> list[slice]:
    """Blocks of rows, one to be computed at a time: the sequence in slices of a multiple of `multiple` queries, but for
    the last one.

    A GPU, where small blocks cost what starting their kernels costs, takes more rows: as many as keep it busy, and
    have at most four times as many scores as the queries have numbers. Memory grows with the length all the same.

    Args:
        keys: that a row is multiplied with.
        length: of the sequence, where it is not that of the queries.
    """
    batch, heads, total, dim = q_BHSD.shape
    length, rows = total if length is None else length, ROWS
    if q_BHSD.device.type != "cpu":
        rows = max(ROWS, min(4 * total * dim, _MANY // (batch * heads)) // max(1, keys))
    rows = multiple * max(1, rows // multiple)
    return [slice(start, min(length, start + rows)) for start in range(0, length, rows)]


def recomputed(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """compute(*inputs), which keeps the inputs alone for the backward; it closes over no tensor that wants a gradient.

    torch's own checkpoint is what a compiler can trace; without one it does more than is needed here.
    """
    if torch.compiler.is_compiling():
        traced: Tensor = checkpoint(compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return traced
    out: Tensor = _Recomputed.apply(compute, *inputs)
    return out


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, *inputs):
        ctx.compute = compute
        ctx.save_for_backward(*inputs)
        return compute(*inputs)

    @staticmethod
    def backward(ctx, d_out):
        wanted = ctx.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
        with torch.enable_grad():
            out = ctx.compute(*inputs)
        given = torch.autograd.grad(out, [x for x in inputs if x.requires_grad], d_out, allow_unused=True)
        gradients = iter(given)
        return None, *(next(gradients) if w else None for w in wanted)


def wide_scores(q_BHQD: Tensor, k_BHSD: Tensor, scale: float | None) -> Tensor:
    """Scaled products [B, H, Q, S] in fp32 (fp64 for fp64)."""
    scores = q_BHQD @ k_BHSD.mT
    return scores.to(torch.promote_types(scores.dtype, torch.float32)) * score_scale(scale, q_BHQD)


def seen_softmax(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over what is seen (broadcasts); a row that sees nothing is 0, and so are its gradients."""
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1)
    return weights.masked_fill(~seen, 0)


def average(weights: Tensor, v_BKSD: Tensor, like_BHQD: Tensor) -> Tensor:
    """weights [B, H, Q, S] times the values of each query head, in the values' dtype."""
    return weights.to(v_BKSD.dtype) @ per_query_head(v_BKSD, like_BHQD)


def dropped(weights: Tensor, dropout: WeightDropout | None, queries: slice, keys: slice) -> Tensor:
    """Weights [B, H, queries, keys] after dropout by their coordinates."""
    if dropout is None:
        return weights
    kept = dropout.kept(weights.shape[1], queries, keys)
    return torch.where(kept, weights * random.kept_scale(dropout.p), 0)


def of_summaries(dropout: WeightDropout | None) -> WeightDropout | None:
    """Dropout of the weights of summaries, whose numbers are columns of their own."""
    return None if dropout is None else dropout._replace(key=dropout.key ^ random.key(0, "summaries"))


class Blocks(NamedTuple):
    """Which tokens of each block of the keys a summary of that block stands for.

    Documents are contiguous. A query after a block that shares a document with it shares that of its last token, and
    a query before it that of its first: a summary counts the tokens of this one document, its owner, and is seen by
    queries of the owner alone. So no query depends on another document, wherever documents begin.

    Attributes:
        owner_BM: int, the document summarised; B is 1 without documents.
        counted_BMb: bool, tokens that belong to it; none beyond the sequence.
    """

    owner_BM: Tensor
    counted_BMb: Tensor

    @property
    def count_BM(self) -> Tensor:
        return self.counted_BMb.sum(-1)

    def mean(self, x_BKSD: Tensor) -> Tensor:
        """Mean over the tokens counted, [B, K, M, D]; 0 where there are none."""
        sums = self.sum(x_BKSD)
        return (sums / self.count_BM.clamp(min=1)[:, None, :, None]).to(x_BKSD.dtype)

    def sum(self, x_BKSD: Tensor) -> Tensor:
        """Sum of the tokens counted, [B, K, M, D] in fp32 (fp64 for fp64)."""
        shares = self.counted_BMb.to(x_BKSD.dtype)[:, None, :, None]
        sums = (shares @ in_blocks(x_BKSD, self.counted_BMb.shape[-1])).squeeze(-2)
        return sums.to(torch.promote_types(sums.dtype, torch.float32))


def owned(documents_BS: Tensor, width: int, last: bool = True) -> Blocks:
    """Blocks of `width` tokens for queries after them (`last`), or before them."""
    length = documents_BS.shape[1]
    padded = F.pad(documents_BS.long(), (0, -length % width), value=_NOBODY).unflatten(1, (-1, width))
    owner = padded[..., -1 if last else 0]
    return Blocks(owner, (padded == owner[..., None]) & (padded != _NOBODY))


def documents_of(mask: Mask, length: int, device: torch.device) -> Tensor:
    """Documents int [B, S], or [1, S] zeros where the mask has none."""
    return (
        mask.documents
        if mask.documents is not None
        else torch.zeros(1, length, dtype=torch.int32, device=device)
    )


def in_blocks(x_BKSD: Tensor, width: int) -> Tensor:
    """[B, K, S, D] -> [B, K, M, width, D], zeros beyond the sequence."""
    return F.pad(x_BKSD, (0, 0, 0, -x_BKSD.shape[2] % width)).unflatten(2, (-1, width))


def blocks_of(length: int, width: int) -> int:
    return math.ceil(length / width)
