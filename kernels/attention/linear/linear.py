"""Linear attention: phi(Q) (phi(K)^T V) / phi(Q) sum phi(K) (Katharopoulos et al. 2020, equations 5, 7 and 8).

Whatever the features phi are, products of features stand where dense attention has exponentials of scores; the sum
over keys can then be formed before a query is known, which `featured` does.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, M features, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.linear.featured import Average, Map, average, divided
from headway.kernels.attention.linear.scan import exactly, scaled
from headway.kernels.attention.masks import Mask, lower


def elu_features(x: Tensor, scale: float | None = None) -> Tensor:
    """elu(x) + 1 in fp32 or wider: e^x below 0, which keeps digits that elu(x) + 1 rounds away."""
    x = scaled(x.to(torch.promote_types(x.dtype, torch.float32)), scale)
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


ELU = Map(
    queries=lambda x, w: elu_features(x),
    keys=lambda x, w, level: elu_features(x),
    pull=lambda x, phi, d_phi, w, of_keys: (d_phi * phi.clamp(max=1), None),
)


def reference(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
) -> Tensor:
    """The specification of linear attention with elu(x) + 1, O(Q S) in memory; returns [B, H, Q, D].

    `scale` is a factor of the queries before their features are taken; 1 if None, as in the paper. A query that sees
    nothing gets 0. `dropout` and `bias_HQK` must be None.
    """
    assert dropout is None
    assert bias_HQK is None
    return quadratic(elu_features(q_BHQD, scale), elu_features(k_BKSD), v_BKSD, mask)


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    by: Average = average,
) -> Tensor:
    """As `reference`, in O((Q + S) D^2) time and O((Q + S) D) memory.

    Args:
        by: what averages by features: `featured.average` or a fused form of it.
    """
    assert dropout is None
    assert bias_HQK is None
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    return by(ELU, scaled(q_BHQD.to(wide), scale), k_BKSD.to(wide), v_BKSD, mask)


def weights(
    q_BHQD: Tensor, k_BKSD: Tensor, mask: Mask, scale: float | None = None, bias_HQK: Tensor | None = None
) -> Tensor:
    """What `reference` averages values by, [B, H, Q, S] in fp32 or wider; rows sum to 1, or 0 if nothing is seen."""
    assert bias_HQK is None
    return feature_weights(elu_features(q_BHQD, scale), elu_features(k_BKSD), mask)


def feature_weights(q_BHQM: Tensor, k_BKSM: Tensor, mask: Mask, floor: float = 0) -> Tensor:
    """Weights of keys that features of queries and keys define, [B, H, Q, S].

    `floor`: what the sum of products is raised to if it is less, for features whose products may be negative.
    """
    with exactly(q_BHQM):
        products_BHQS = q_BHQM @ per_query_head(k_BKSM, q_BHQM).mT
        seen = lower(mask, q_BHQM.shape[2], k_BKSM.shape[2], q_BHQM.device)
        if seen is not None:
            products_BHQS = products_BHQS.masked_fill(~seen, 0)
        return divided(products_BHQS, products_BHQS.sum(-1, keepdim=True), floor)


def quadratic(q_BHQM: Tensor, k_BKSM: Tensor, v_BKSD: Tensor, mask: Mask, floor: float = 0) -> Tensor:
    """Mean of values by `feature_weights`, [B, H, Q, D] like v."""
    weights_BHQS = feature_weights(q_BHQM, k_BKSM, mask, floor)
    with exactly(q_BHQM):
        return (weights_BHQS @ per_query_head(v_BKSD, q_BHQM).to(weights_BHQS.dtype)).to(v_BKSD.dtype)
