"""Random feature attention: products of sines and cosines estimate a Gaussian kernel (Peng et al. 2021, section 3.1).

Queries and keys have unit norm, so that the kernel is a multiple of exp(q . k).

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, M directions, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.linear.featured import Average, Map, average
from headway.kernels.attention.linear.features import of_heads
from headway.kernels.attention.linear.linear import feature_weights, quadratic
from headway.kernels.attention.linear.scan import exactly
from headway.kernels.attention.masks import Mask

FLOOR = 0.1
"""Least sum of weights of random feature attention. Sines and cosines estimate without a sign, and the sum of a few
keys may come out at 0 or below; a key of unit norm truly weighs at least e^-2 = 0.14 where sigma is 1. The authors'
code clamps too (at about one key's greatest weight), the paper does not say."""


def reference(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    sigma: Tensor,
    features: int = 64,
    redraw: int = 1,
) -> Tensor:
    """The specification of random feature attention (Peng et al. 2021, section 3.1), O(Q S) in memory.

    Args:
        scale: of the products of unit vectors; 1 if None.
        draw, features, redraw: see `features.reference`.
        sigma: [H, D], learned deviations of directions in each dimension (section 3.3 calls it reparameterisation).

    Returns:
        [B, H, Q, D]; 0 where a query sees nothing. `dropout` and `bias_HQK` must be None.
    """
    assert dropout is None
    assert bias_HQK is None
    return quadratic(*_features(q_BHQD, k_BKSD, scale, draw, sigma, features, redraw), v_BKSD, mask, FLOOR)


def weights(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    sigma: Tensor,
    features: int = 64,
    redraw: int = 1,
) -> Tensor:
    """What `reference` averages values by, [B, H, Q, S]; may be negative, and rows may sum to less than 1."""
    assert bias_HQK is None
    return feature_weights(*_features(q_BHQD, k_BKSD, scale, draw, sigma, features, redraw), mask, FLOOR)


def attention(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    sigma: Tensor,
    features: int = 64,
    redraw: int = 1,
    by: Average = average,
) -> Tensor:
    """As `reference`, in O((Q + S) M D) time and O((Q + S) D) memory.

    Args:
        by: what averages by features: `featured.average` or a fused form of it.
    """
    assert dropout is None
    assert bias_HQK is None
    q, k, w_HMD = _turned(q_BHQD, k_BKSD, scale, draw, sigma, features, redraw)
    return by(WAVES, q, k, v_BKSD, mask, w_HMD, floor=FLOOR)


def _turned(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    scale: float | None,
    draw: Draw,
    sigma: Tensor,
    features: int,
    redraw: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys [B, H, S, D] of unit norm, directions [H, M, D] of deviations sigma; in fp32 or wider."""
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    unit_q, unit_k = (F.normalize(x.to(wide), dim=-1) for x in (q_BHQD, k_BKSD))
    deviations_H1D = sigma.to(wide)[:, None] * (1 if scale is None else scale) ** 0.5
    w_HMD = of_heads(False, q_BHQD, draw, features, redraw) * deviations_H1D
    return unit_q, per_query_head(unit_k, q_BHQD), w_HMD


def _features(q_BHQD: Tensor, k_BKSD: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    q, k, w_HMD = _turned(q_BHQD, k_BKSD, *given)
    with exactly(q):
        return _waves(q, w_HMD[None]), _waves(k, w_HMD[None])


def _waves(x: Tensor, w: Tensor | None) -> Tensor:
    """[sin(w . x), cos(w . x)] / sqrt(M), [..., 2 M] (equation 4).

    Products of two have the mean exp(-|sigma (x - y)|^2 / 2): of unit vectors, at sigma 1, a multiple of exp(x . y).
    """
    assert w is not None
    angles = x @ w.mT
    return torch.cat([angles.sin(), angles.cos()], -1) * w.shape[-2] ** -0.5


def _pull(x: Tensor, phi: Tensor, d_phi: Tensor, w: Tensor | None, of_keys: bool) -> tuple[Tensor, Tensor]:
    assert w is not None
    (sin, cos), (d_sin, d_cos) = phi.chunk(2, -1), d_phi.chunk(2, -1)
    d_angles = d_sin * cos - d_cos * sin
    return d_angles @ w, (d_angles.mT @ x).sum(0, keepdim=True)


WAVES = Map(_waves, lambda x, w, level: _waves(x, w), _pull)
