"""Adaptive attention span (Sukhbaatar et al. 2019, "Adaptive Attention Span in Transformers", section 2.2).

    a_ij = m_z(i - j) exp(s_ij) / sum_j' m_z(i - j') exp(s_ij'),   m_z(x) = clamp((ramp + z - x) / ramp, 0, 1)

z, the span of a head in tokens, is learned: span * sigmoid(reach), which stays within the paper's [0, span] without a
hand on the parameter after each update. At most `span` tokens are looked at, the token itself (x = 0) among them;
fairseq's model leaves the token itself out and starts at the one before it with x = 0, and does not normalise again.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.content import strips
from headway.kernels.attention.content.pieces import average, dropped, wide_scores
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
    span: int,
    ramp: int,
    reach: Tensor,
) -> Tensor:
    """Dense attention times a soft mask, normalised again; [B, H, S, D]. Arguments: `dense.reference`.

    Args:
        span: tokens that a head can reach at most; both ways: on each side.
        ramp: tokens over which the mask falls from 1 to 0.
        reach: [H], see above.
    """
    every = slice(0, q_BHSD.shape[2])
    weights = attention_weights(q_BHSD, k_BKSD, mask, scale, bias_HQK, span=span, ramp=ramp, reach=reach)
    return average(dropped(weights, dropout, every, every), v_BKSD, q_BHSD)


def attention_weights(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    span: int,
    ramp: int,
    reach: Tensor,
) -> Tensor:
    """Weights [B, H, S, S]; rows sum to 1."""
    assert bias_HQK is None
    length = q_BHSD.shape[2]
    place = torch.arange(length, device=q_BHSD.device)
    scores = wide_scores(q_BHSD, per_query_head(k_BKSD, q_BHSD), scale)
    distance = (place[:, None] - place).abs()
    seen = lower(mask._replace(scope=Window(span)), length, length, q_BHSD.device)
    assert seen is not None
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1)
    weights = weights * soft_mask(distance.to(scores.dtype), reach, span, ramp)
    return weights / weights.sum(-1, keepdim=True)


def attention(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    span: int,
    ramp: int,
    reach: Tensor,
) -> Tensor:
    """The same in strips of keys within reach, recomputed in the backward: O(S span D), O(S) held."""
    assert bias_HQK is None

    def soft(distance, reach):
        return soft_mask(distance, reach, span, ramp)

    strip = within(span, mask.causal)
    near = _near(span)
    return strips.attention(q_BHSD, k_BKSD, v_BKSD, mask, strip, near, scale, dropout, None, soft, [reach])


def _near(span):
    return lambda query, key: (query - key).abs() < span


def spans(reach: Tensor, span: int) -> Tensor:
    """z: the span of each head in tokens, [H]; the paper adds its mean, times a small factor, to the loss."""
    return span * reach.sigmoid()


def soft_mask(distance: Tensor, reach_H: Tensor, span: int, ramp: int) -> Tensor:
    """m_z of distances of any shape [...], [H, ...] in their dtype; 1 at distance 0 and below z."""
    z = spans(reach_H.to(distance.dtype), span)
    return ((ramp + z.view(-1, *[1] * distance.dim()) - distance) / ramp).clamp(0, 1)
