"""Graph attention over edge lists, O(edges) (Velickovic et al. 2018, equations 1 to 4; Brody et al. 2022, equation 7).

An edge j -> i lets i read j. A node that no edge reaches gets 0.
Shapes: B batch, N nodes, A edges, H heads, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SLOPE = 0.2
"""Of the leaky ReLU for negative arguments."""


def reference(
    h_BNHD: Tensor,
    edges_2A: Tensor,
    source_HD: Tensor,
    target_HD: Tensor,
    seen_BA: Tensor | None = None,
) -> Tensor:
    """The specification: softmax_j LeakyReLU(a [W h_i || W h_j]) over a dense mask, times W h_j.

    Args:
        h_BNHD: W h of each head.
        edges_2A: int64, rows j and i of edges j -> i, no edge twice.
        source_HD, target_HD: the halves of `a` that meet h_j and h_i.
        seen_BA: which edges are there in a row of the batch; all if None.

    Returns:
        [B, N, H, D].
    """
    by_source, by_target = ((h_BNHD * a).sum(-1).transpose(1, 2) for a in (source_HD, target_HD))
    scores_BHNN = F.leaky_relu(by_target.unsqueeze(3) + by_source.unsqueeze(2), SLOPE)
    return _dense(scores_BHNN, h_BNHD, edges_2A, seen_BA)


def reference_v2(
    h_BNHD: Tensor,
    edges_2A: Tensor,
    asking_BNHD: Tensor,
    a_HD: Tensor,
    seen_BA: Tensor | None = None,
) -> Tensor:
    """The specification of GATv2: softmax_j a LeakyReLU(W_t h_i + W_s h_j), times W_s h_j.

    Args:
        h_BNHD: W_s h of each head.
        asking_BNHD: W_t h of each head.
        a_HD: the scores' vector.
        edges_2A, seen_BA: see `reference`.
    """
    pairs_BNNHD = asking_BNHD.unsqueeze(2) + h_BNHD.unsqueeze(1)
    scores_BHNN = (F.leaky_relu(pairs_BNNHD, SLOPE) * a_HD).sum(-1).permute(0, 3, 1, 2)
    return _dense(scores_BHNN, h_BNHD, edges_2A, seen_BA)


def attention(
    h_BNHD: Tensor,
    edges_2A: Tensor,
    source_HD: Tensor,
    target_HD: Tensor,
    seen_BA: Tensor | None = None,
) -> Tensor:
    """As `reference`, edge by edge: O(A H) numbers, and O(N H D) of them at once that have features."""
    by_source, by_target = ((h_BNHD * a).sum(-1) for a in (source_HD, target_HD))
    scores_BAH = F.leaky_relu(by_target[:, edges_2A[1]] + by_source[:, edges_2A[0]], SLOPE)
    return _along(scores_BAH, h_BNHD, edges_2A, seen_BA)


def attention_v2(
    h_BNHD: Tensor,
    edges_2A: Tensor,
    asking_BNHD: Tensor,
    a_HD: Tensor,
    seen_BA: Tensor | None = None,
) -> Tensor:
    """As `reference_v2`; the features of edges are computed again in the backward."""

    def score(source_A: Tensor, target_A: Tensor, asking: Tensor, h: Tensor, a_HD: Tensor) -> Tensor:
        return (F.leaky_relu(asking[:, target_A] + h[:, source_A], SLOPE) * a_HD).sum(-1)

    parts = [
        checkpoint(
            score,
            *edges_2A[:, some],
            asking_BNHD,
            h_BNHD,
            a_HD,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for some in _parts(edges_2A, h_BNHD)
    ]
    return _along(torch.cat(parts, 1), h_BNHD, edges_2A, seen_BA)


def softmax_of_segments(scores_BAH: Tensor, target_A: Tensor, nodes: int, seen_BA: Tensor | None) -> Tensor:
    """exp(score) over its sum among the edges of one target, [B, A, H] in fp32 (fp64 for fp64); 0 where not seen."""
    scores = scores_BAH.to(torch.promote_types(scores_BAH.dtype, torch.float32))
    least = torch.finfo(scores.dtype).min
    if seen_BA is not None:
        scores = torch.where(seen_BA.unsqueeze(2), scores, least)
    shape = (scores.shape[0], nodes, scores.shape[2])
    where = target_A[:, None].expand_as(scores)
    peak_BNH = scores.new_full(shape, least).scatter_reduce(1, where, scores.detach(), "amax")
    weights = torch.exp(scores - peak_BNH[:, target_A])
    if seen_BA is not None:
        weights = torch.where(seen_BA.unsqueeze(2), weights, 0)
    sums = weights.new_zeros(shape).index_add(1, target_A, weights)
    return weights / torch.where(sums > 0, sums, 1)[:, target_A]


def near_in_row(length: int, distance: int, causal: bool, device: torch.device) -> Tensor:
    """Edges [2, A] between places at most so far apart, and of each with itself; `causal`: from earlier ones only."""
    parts = []
    for ahead in range(-min(distance, length - 1), (0 if causal else min(distance, length - 1)) + 1):
        target = torch.arange(max(0, -ahead), length - max(0, ahead), device=device)
        parts.append(torch.stack((target + ahead, target)))
    return torch.cat(parts, 1)


def pairs(length: int, distance: int) -> int:
    """Edges that `near_in_row` gives where it is not causal."""
    far = min(distance, length - 1)
    return length + far * (2 * length - far - 1)


def near_in_grid(side: int, distance: int, first: int, device: torch.device) -> Tensor:
    """Edges [2, A] between places of a square grid whose rows and columns are at most so far apart, and of each with
    itself; each of the `first` nodes, which have no place on it, is linked with all, both ways."""
    row = near_in_row(side, distance, False, device)  # of rows, and of columns
    source, target = ((side * axis[:, None] + axis[None]).flatten() + first for axis in row)
    parts = [torch.stack((source, target))]
    everyone = torch.arange(first + side * side, device=device)
    for node in range(first):
        it = torch.full_like(everyone, node)
        # Edges to this node, then from it to those that do not read it yet.
        parts += [torch.stack((everyone, it)), torch.stack((it, everyone))[:, first:]]
    return torch.cat(parts, 1)


def _along(scores_BAH: Tensor, h_BNHD: Tensor, edges_2A: Tensor, seen_BA: Tensor | None) -> Tensor:
    weights_BAH = softmax_of_segments(scores_BAH, edges_2A[1], h_BNHD.shape[1], seen_BA)
    out: Tensor = _Sums.apply(weights_BAH.to(h_BNHD.dtype), h_BNHD, edges_2A)
    return out


def _dense(scores_BHNN: Tensor, h_BNHD: Tensor, edges_2A: Tensor, seen_BA: Tensor | None) -> Tensor:
    rows, nodes = scores_BHNN.shape[0], scores_BHNN.shape[3]
    linked = torch.zeros((rows, nodes, nodes), dtype=torch.bool, device=scores_BHNN.device)
    linked[:, edges_2A[1], edges_2A[0]] = True if seen_BA is None else seen_BA
    hidden = ~linked.unsqueeze(1)
    wide = scores_BHNN.to(torch.promote_types(scores_BHNN.dtype, torch.float32))
    weights = torch.softmax(wide.masked_fill(hidden, torch.finfo(wide.dtype).min), -1).masked_fill(hidden, 0)
    return torch.einsum("bhij,bjhd->bihd", weights.to(h_BNHD.dtype), h_BNHD)


def _parts(edges_2A: Tensor, h_BNHD: Tensor) -> list[slice]:
    """Runs of as many edges as there are nodes: their features are as large as the nodes' own."""
    edges, some = edges_2A.shape[1], h_BNHD.shape[1]
    return [slice(start, min(edges, start + some)) for start in range(0, edges, some)]


class _Sums(torch.autograd.Function):
    """sum over edges j -> i of weight h_j, [B, N, H, D]; sums are kept in fp32 or wider."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, h: Tensor, edges: Tensor) -> Tensor:
        ctx.save_for_backward(weights, h, edges)
        return _scattered(weights, h, edges[0], edges[1], _parts(edges, h))

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        weights, h, edges = ctx.saved_tensors
        source, target = edges
        parts = _parts(edges, h)
        d_weights = [(d_out[:, target[some]] * h[:, source[some]]).sum(-1) for some in parts]
        return torch.cat(d_weights, 1), _scattered(weights, d_out, target, source, parts), None


def _scattered(weights: Tensor, h: Tensor, read: Tensor, written: Tensor, parts: list[slice]) -> Tensor:
    out = torch.zeros_like(h, dtype=torch.promote_types(h.dtype, torch.float32))
    for some in parts:
        out.index_add_(1, written[some], (h[:, read[some]] * weights[:, some].unsqueeze(-1)).to(out.dtype))
    return out.to(h.dtype)
