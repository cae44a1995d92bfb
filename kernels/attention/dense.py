"""Dense attention: softmax(Q K^T / sqrt(D)) V (Vaswani et al. 2017, equation 1).

Grouped queries (Ainslie et al. 2023): query head h reads key/value head h // (H / K).
Shapes: B batch, H query heads, K key/value heads, S sequence, D head dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.masks import Mask, lower


class WeightDropout(NamedTuple):
    """Dropout of attention weights by global coordinates.

    Attributes:
        p: chance that a weight is dropped.
        key: int64, 0-dim; see `headway.kernels.random`.
        slots: int64 [B], the samples' places in the global batch.
        positions: int64 [S], the queries' places in the sequence.
        first_head: global index of the first query head here.
    """

    p: float
    key: Tensor
    slots: Tensor
    positions: Tensor
    first_head: int = 0


def reference(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, dropout: WeightDropout | None = None
) -> Tensor:
    """The specification of dense attention, O(S^2) in memory; returns [B, H, S, D]."""
    weights_BHSS = attention_weights(q_BHSD, k_BKSD, mask)
    if dropout is not None:
        heads = torch.arange(q_BHSD.shape[1], device=q_BHSD.device) + dropout.first_head
        coordinates = (dropout.slots[:, None, None], heads[None, :, None], dropout.positions[None, None, :])
        weights_BHSS = random.dropout(weights_BHSS, dropout.p, dropout.key, coordinates)
    return weights_BHSS.to(v_BKSD.dtype) @ _per_query_head(v_BKSD, q_BHSD)


def attention_weights(q_BHSD: Tensor, k_BKSD: Tensor, mask: Mask) -> Tensor:
    """softmax(Q K^T / sqrt(D)) where the mask allows, [B, H, S, S] in fp32 (fp64 for fp64)."""
    scores = q_BHSD @ _per_query_head(k_BKSD, q_BHSD).mT / math.sqrt(q_BHSD.shape[-1])
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    seen = lower(mask, k_BKSD.shape[2], q_BHSD.device)
    return torch.softmax(scores if seen is None else scores.masked_fill(~seen, -math.inf), -1)


def sdpa(
    q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, dropout: WeightDropout | None = None
) -> Tensor:
    """PyTorch's fused kernels; `dropout` must be None, because theirs depends on layout and device."""
    assert dropout is None
    isolated = mask.documents is not None
    return F.scaled_dot_product_attention(
        q_BHSD,
        k_BKSD,
        v_BKSD,
        attn_mask=lower(mask, k_BKSD.shape[2], q_BHSD.device) if isolated else None,
        is_causal=mask.causal and not isolated,
        enable_gqa=q_BHSD.shape[1] != k_BKSD.shape[1],
    )


def _per_query_head(kv_BKSD: Tensor, q_BHSD: Tensor) -> Tensor:
    group = q_BHSD.shape[1] // kv_BKSD.shape[1]
    return kv_BKSD if group == 1 else kv_BKSD.repeat_interleave(group, 1)
