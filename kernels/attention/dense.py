"""Dense attention: softmax(scale Q K^T + bias) V (Vaswani et al. 2017, equation 1; bias: Raffel et al. 2020, 2.1).

Grouped queries (Ainslie et al. 2023): query head h reads key/value head h // (H / K).
Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.slopes import Bias, block_of


class WeightDropout(NamedTuple):
    """Dropout of attention weights by global coordinates.

    Attributes:
        p: chance that a weight is dropped.
        key: int64, 0-dim; see `headway.kernels.random`.
        slots: int64 [B], the samples' places in the global batch.
        positions: int64 [Q], the queries' places in the sequence.
        first_head: global index of the first query head here.
        first_key: place in the sequence of the first key here.
    """

    p: float
    key: Tensor
    slots: Tensor
    positions: Tensor
    first_head: int = 0
    first_key: int = 0

    def kept(self, heads: int, queries: slice, keys: slice) -> Tensor:
        """Which weights are kept of so many heads, bool [B, H, Q, K], of some of the queries and keys here."""
        heads_H = torch.arange(heads, device=self.positions.device) + self.first_head
        coordinates = (
            self.slots[:, None, None],
            heads_H[None, :, None],
            self.positions[None, None, queries],
        )
        return random.keep(
            self.key, self.p, coordinates, keys.stop + self.first_key, keys.start + self.first_key
        )


def reference(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
) -> Tensor:
    """The specification of dense attention, O(Q S) in memory; returns [B, H, Q, D].

    Args:
        q_BHQD, k_BKSD, v_BKSD: queries; keys and values, of another length in cross-attention.
        mask: what is seen; a query that sees nothing gets 0.
        dropout: of the weights, after the softmax.
        scale: factor of the products; 1 / sqrt(D) if None.
        bias_HQK: added to the scaled products; gets a gradient, if it is a tensor.
    """
    weights_BHQS = attention_weights(q_BHQD, k_BKSD, mask, scale, bias_HQK)
    if dropout is not None:
        kept = dropout.kept(q_BHQD.shape[1], slice(None), slice(0, k_BKSD.shape[2]))
        weights_BHQS = torch.where(kept, weights_BHQS * random.kept_scale(dropout.p), 0)
    return weights_BHQS.to(v_BKSD.dtype) @ per_query_head(v_BKSD, q_BHQD)


def attention_weights(
    q_BHQD: Tensor, k_BKSD: Tensor, mask: Mask, scale: float | None = None, bias_HQK: Bias | None = None
) -> Tensor:
    """softmax(scale Q K^T + bias) where the mask allows, [B, H, Q, S] in fp32 (fp64 for fp64).

    Rows sum to 1, or to 0 where nothing is seen.
    """
    scores = q_BHQD @ per_query_head(k_BKSD, q_BHQD).mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * score_scale(scale, q_BHQD)
    if bias_HQK is not None:
        scores = scores + block_of(bias_HQK)
    seen = lower(mask, q_BHQD.shape[2], k_BKSD.shape[2], q_BHQD.device)
    if seen is None:
        return torch.softmax(scores, -1)
    # A finite fill and a second one after the softmax: rows that see nothing are 0, and so are their gradients.
    weights = torch.softmax(scores.masked_fill(~seen, torch.finfo(scores.dtype).min), -1)
    return weights.masked_fill(~seen, 0)


def sdpa(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Bias | None = None,
) -> Tensor:
    """PyTorch's fused kernels; `dropout` must be None, because theirs depends on layout and device.

    A bias, and a mask, is written out: O(Q S) for every head. With a bias that needs a gradient, PyTorch's path on CPU
    is not fused either.
    """
    assert dropout is None
    whole = mask.documents is None and mask.prefix is None and mask.scope is None and bias_HQK is None
    seen = None if whole else lower(mask, q_BHQD.shape[2], k_BKSD.shape[2], q_BHQD.device)
    some = None
    if seen is not None and mask.may_hide_all:
        # Fused kernels differ in what they make of rows that see nothing: such rows are let see all, then zeroed.
        some = seen.any(-1, keepdim=True)
        seen = seen | ~some
    out = F.scaled_dot_product_attention(
        q_BHQD,
        k_BKSD,
        v_BKSD,
        attn_mask=seen if bias_HQK is None else _masked_bias(block_of(bias_HQK).to(q_BHQD.dtype), seen),
        is_causal=mask.causal and whole,
        scale=scale,
        enable_gqa=q_BHQD.shape[1] != k_BKSD.shape[1],
    )
    return out if some is None else torch.where(some, out, 0)


def score_scale(scale: float | None, q_BHQD: Tensor) -> float:
    """The given factor of the scores, or 1 / sqrt(D)."""
    return 1 / math.sqrt(q_BHQD.shape[-1]) if scale is None else scale


def per_query_head(kv_BKSD: Tensor, q_BHQD: Tensor) -> Tensor:
    """Keys or values repeated for the query heads that read them, [B, H, S, D]."""
    group = q_BHQD.shape[1] // kv_BKSD.shape[1]
    return kv_BKSD if group == 1 else kv_BKSD.repeat_interleave(group, 1)


def _masked_bias(bias_HQK: Tensor, seen: Tensor | None) -> Tensor:
    return bias_HQK[None] if seen is None else torch.where(seen, bias_HQK, -math.inf)
