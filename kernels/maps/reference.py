"""Distillation of attention maps that holds the maps: the specification of every kernel, O(Q S) in memory.

Shapes: B batch, H student heads, G teacher heads for each, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.slopes import block_of
from headway.kernels.maps.operands import Scores, Seen


def sums(teacher: Scores, student: Scores, loss: str, seen: Seen, rows_BQ: Tensor | None) -> Tensor:
    """Sum over a sample's rows of the mean over heads, [B]; see `operands.Sums`."""
    batch, heads, queries, _ = student.q.shape
    found = seen.block(student)
    if found is None:
        found = torch.ones(1, 1, queries, student.k.shape[2], dtype=torch.bool, device=student.q.device)
    seen_BHQS = found.expand(batch, heads, -1, -1)
    t_BHGQS = scores_of(teacher).unflatten(1, (heads, -1))
    s_BHQS = scores_of(student).to(torch.promote_types(t_BHGQS.dtype, student.q.dtype))
    t_BHGQS = t_BHGQS.to(s_BHQS.dtype)
    if loss == "scores":
        each_BHQS = (s_BHQS - t_BHGQS.mean(2)) ** 2
    else:
        log_p_BHGQS = log_weights(t_BHGQS, seen_BHQS.unsqueeze(2))
        log_p_BHQS = log_p_BHGQS.logsumexp(2) - math.log(log_p_BHGQS.shape[2])
        each_BHQS = divergence(loss, log_p_BHQS, log_weights(s_BHQS, seen_BHQS))
    value_BHQ = torch.where(seen_BHQS, each_BHQS, 0).sum(-1)
    if loss in ("mse", "scores"):
        value_BHQ = value_BHQ / seen_BHQS.sum(-1).clamp(min=1)
    if rows_BQ is not None:
        value_BHQ = torch.where(rows_BQ.unsqueeze(1), value_BHQ, 0)
    return value_BHQ.mean(1).sum(1)


def scores_of(scores: Scores) -> Tensor:
    """[B, H, Q, S] in fp32 (fp64 for fp64)."""
    products = scores.q @ per_query_head(scores.k, scores.q).mT
    scaled = products.to(torch.promote_types(products.dtype, torch.float32)) * scores.scale
    return scaled if scores.bias is None else scaled + block_of(scores.bias)


def log_weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Logarithms of the softmax over the keys that are seen; 0 elsewhere, where they do not count."""
    log_p = torch.log_softmax(torch.where(seen, scores, torch.finfo(scores.dtype).min), -1)
    return torch.where(seen, log_p, 0)


def divergence(loss: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """What a key adds to its row's loss."""
    p, q = log_p.exp(), log_q.exp()
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    if loss == "kl":
        return p * (log_p - log_q)
    if loss == "reverse_kl":
        return q * (log_q - log_p)
    if loss == "js":
        return (p * (log_p - log_m) + q * (log_q - log_m)) / 2
    return (q - p) ** 2
