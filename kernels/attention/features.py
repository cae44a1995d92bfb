"""Random features whose products estimate exponentials of scores: Performer and random feature attention.

Directions are drawn by `headway.kernels.random` from (the module's key, the key/value head's global index, how often
they were drawn anew), so that every rank, and every engine, has those of its heads. What features then define, and how
it is summed, is `linear`'s.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, M features, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.linear import feature_weights, featured, quadratic
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scan import exactly

FLOOR = 0.1
"""Least sum of weights of random feature attention. Sines and cosines estimate without a sign, and the sum of a few
keys may come out at 0 or below; a key of unit norm truly weighs at least e^-2 = 0.14 where sigma is 1. The authors'
code clamps too (at about one key's greatest weight), the paper does not say."""


def directions(
    key: Tensor, heads: int, features: int, dim: int, first_head: int = 0, period: Tensor | int = 0
) -> Tensor:
    """Standard normal directions, fp32 [K, M, D]: a function of the key, head, period, feature and dimension alone.

    Args:
        key: int64, 0-dim; see `headway.kernels.random`.
        heads, first_head: which key/value heads, of all of them.
        period: how often directions were drawn anew, below 2^31.
    """
    head = torch.arange(heads, device=key.device) + first_head
    row = torch.arange(features, device=key.device)
    rows_KM = (period * 2**32 + head * 2**16)[:, None] + row
    return random.normal(key, rows_KM.flatten(), 0, dim).unflatten(0, (heads, features))


def orthogonal_directions(
    key: Tensor, heads: int, features: int, dim: int, first_head: int = 0, period: Tensor | int = 0
) -> Tensor:
    """As `directions`, but orthogonal inside each block of D features (Choromanski et al. 2021, section 2.4).

    Rows of a normal matrix are orthogonalised in order, which leaves directions uniform, and keep their norms, which
    do not depend on directions. The Cholesky factor of the rows' products does that, and batches where QR does not;
    unlike QR's its signs are not the library's to choose. In fp64: products square the condition number.
    """
    blocks = -(-features // dim)
    rows = directions(key, heads, blocks * dim, dim, first_head, period).double().unflatten(1, (blocks, dim))
    factor = torch.linalg.cholesky(rows @ rows.mT)
    unit = torch.linalg.solve_triangular(factor, rows, upper=False)
    return (unit * rows.norm(dim=-1, keepdim=True)).flatten(1, 2)[:, :features].float()


def favor_reference(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    features: int = 256,
    redraw: int = 0,
) -> Tensor:
    """The specification of Performer (FAVOR+, Choromanski et al. 2021, section 2), O(Q S) in memory.

    Args:
        scale: of the scores that are estimated; 1 / sqrt(D) if None.
        draw: what directions are a function of.
        features: how many.
        redraw: optimizer steps after which directions are drawn anew; 0 never.

    Returns:
        [B, H, Q, D]; 0 where a query sees nothing. `dropout` and `bias_HQK` must be None.
    """
    assert dropout is None and bias_HQK is None
    queries_BHQM, keys_BKSM = _favor_features(q_BHQD, k_BKSD, scale, draw, features, redraw)
    return quadratic(queries_BHQM, keys_BKSM, v_BKSD, mask)


def favor_weights(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    features: int = 256,
    redraw: int = 0,
) -> Tensor:
    """What `favor_reference` averages values by, [B, H, Q, S]."""
    assert bias_HQK is None
    return feature_weights(*_favor_features(q_BHQD, k_BKSD, scale, draw, features, redraw), mask)


def favor(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    features: int = 256,
    redraw: int = 0,
) -> Tensor:
    """As `favor_reference`, in O((Q + S) M D) time and O((Q + S) M) memory.

    A key's features are divided by the greatest that its document had up to it (all of its document if not causal):
    no exponent is above 0, no later key is asked, and what is divided by cancels. No epsilon is added to features, as
    the authors' code does, which would tell documents and layouts apart.
    """
    assert dropout is None and bias_HQK is None
    queries, keys = _favor_logs(q_BHQD, k_BKSD, scale, draw, features, redraw)
    key_documents = mask.documents if mask.key_documents is None else mask.key_documents
    with torch.no_grad():
        greatest = (running_max if mask.causal else document_max)(keys.amax(-1), key_documents)
    queries, keys = (queries - queries.detach().amax(-1, keepdim=True)).exp(), (keys - greatest[..., None]).exp()
    return featured(queries, keys, v_BKSD, mask, level_BKS=greatest if mask.causal else None)


def _favor_features(*given: Any) -> tuple[Tensor, Tensor]:
    """Positive features of queries and keys, up to a factor that cancels: one of each query, and one of all keys."""
    queries, keys = _favor_logs(*given)
    greatest = keys.detach().amax((-1, -2), keepdim=True)
    return (queries - queries.detach().amax(-1, keepdim=True)).exp(), (keys - greatest).exp()


def _favor_logs(
    q_BHQD: Tensor, k_BKSD: Tensor, scale: float | None, draw: Draw, features: int, redraw: int
) -> tuple[Tensor, Tensor]:
    """Logarithms of positive features of queries [B, H, Q, M] and keys [B, K, S, M], fp32 or wider.

    exp(scale q . k) is the mean over w of exp(w . q') exp(w . k' - |k'|^2 / 2) exp(-|q'|^2 / 2), x' = sqrt(scale) x
    (lemma 1). The last factor is one number of a query: it cancels, and is left out.
    """
    wide, root = torch.promote_types(q_BHQD.dtype, torch.float32), score_scale(scale, q_BHQD) ** 0.5
    q_BHQD, k_BKSD = q_BHQD.to(wide) * root, k_BKSD.to(wide) * root
    with exactly(q_BHQD):
        w_1KMD = _of_heads(orthogonal_directions, q_BHQD, k_BKSD, draw, features, redraw)[None].to(wide)
        keys = k_BKSD @ w_1KMD.mT - k_BKSD.square().sum(-1, keepdim=True) / 2
        return q_BHQD @ per_query_head(w_1KMD, q_BHQD).mT, keys


def _of_heads(
    make: Callable[..., Tensor], q_BHQD: Tensor, k_BKSD: Tensor, draw: Draw, features: int, redraw: int
) -> Tensor:
    """Directions of the key/value heads that are here, [K, M, D]."""
    first = draw.first_head * k_BKSD.shape[1] // q_BHQD.shape[1]
    period = draw.step // redraw if redraw else 0
    with torch.no_grad():
        return make(draw.key, k_BKSD.shape[1], features, q_BHQD.shape[-1], first, period)


def running_max(x_BKS: Tensor, documents: Tensor | None) -> Tensor:
    """Largest value up to each place, of its document where documents [B, S] are given."""
    if documents is None:
        return x_BKS.cummax(-1).values
    documents, reach = documents[:, None], 1
    while reach < x_BKS.shape[-1]:  # after each round of twice as many places
        same = documents[..., reach:] == documents[..., :-reach]
        more = torch.where(same, x_BKS[..., :-reach], x_BKS[..., reach:])
        x_BKS = torch.cat([x_BKS[..., :reach], torch.maximum(x_BKS[..., reach:], more)], -1)
        reach *= 2
    return x_BKS


def document_max(x_BKS: Tensor, documents: Tensor | None) -> Tensor:
    """Largest value of each place's document."""
    if documents is None:
        return x_BKS.amax(-1, keepdim=True)
    back = running_max(x_BKS.flip(-1), documents.flip(-1)).flip(-1)
    return torch.maximum(running_max(x_BKS, documents), back)


def rfa_reference(
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
    redraw: int = 0,
) -> Tensor:
    """The specification of random feature attention (Peng et al. 2021, section 3.1), O(Q S) in memory.

    Args:
        draw, features, redraw: see `favor_reference`.
        sigma: [K, D], learned deviations of directions in each dimension (section 3.3 calls it reparameterisation).

    Returns:
        [B, H, Q, D]; 0 where a query sees nothing. `scale`, `dropout` and `bias_HQK` must be None.
    """
    assert dropout is None and scale is None and bias_HQK is None
    return quadratic(*_rfa_features(q_BHQD, k_BKSD, draw, sigma, features, redraw), v_BKSD, mask, FLOOR)


def rfa_weights(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    sigma: Tensor,
    features: int = 64,
    redraw: int = 0,
) -> Tensor:
    """What `rfa_reference` averages values by, [B, H, Q, S]; may be negative, and rows may sum to less than 1."""
    assert scale is None and bias_HQK is None
    return feature_weights(*_rfa_features(q_BHQD, k_BKSD, draw, sigma, features, redraw), mask, FLOOR)


def rfa(
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
    redraw: int = 0,
) -> Tensor:
    """As `rfa_reference`, in O((Q + S) M D) time and O((Q + S) M) memory."""
    assert dropout is None and scale is None and bias_HQK is None
    return featured(*_rfa_features(q_BHQD, k_BKSD, draw, sigma, features, redraw), v_BKSD, mask, FLOOR)


def _rfa_features(
    q_BHQD: Tensor, k_BKSD: Tensor, draw: Draw, sigma: Tensor, features: int, redraw: int
) -> tuple[Tensor, Tensor]:
    """[sin(w . x), cos(w . x)] / sqrt(M) of queries and keys of unit norm, [..., 2 M] in fp32 or wider (equation 4).

    Their products have the mean exp(-|sigma (q - k)|^2 / 2), at sigma 1 a multiple of exp(q . k).
    """
    wide = torch.promote_types(q_BHQD.dtype, torch.float32)
    with exactly(q_BHQD):
        w_1KMD = _of_heads(directions, q_BHQD, k_BKSD, draw, features, redraw)[None].to(wide)
        w_1KMD = w_1KMD * sigma.to(wide)[:, None]

        def waves(x: Tensor, w: Tensor) -> Tensor:
            angles = F.normalize(x.to(wide), dim=-1) @ w.mT
            return torch.cat([angles.sin(), angles.cos()], -1) * features**-0.5

        return waves(q_BHQD, per_query_head(w_1KMD, q_BHQD)), waves(k_BKSD, w_1KMD)
