"""Random features whose products estimate exponentials of scores; Performer's positive ones (FAVOR+).

Directions are drawn by `headway.kernels.random` from (the module's key, the query head's global index, how often they
were drawn anew), so that every rank, and every engine, has those of its heads, however a layout repeats the heads of
keys. What features then define, and how it is summed, is `linear`'s and `featured`'s.

Shapes: B batch, H query heads, K key/value heads, Q queries, S keys, M features, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.linear.featured import Average, Map, average, segments
from headway.kernels.attention.linear.linear import feature_weights, quadratic
from headway.kernels.attention.linear.scan import exactly
from headway.kernels.attention.masks import Mask


def directions(
    key: Tensor, heads: int, features: int, dim: int, first_head: int = 0, period: Tensor | int = 0
) -> Tensor:
    """Standard normal directions, fp32 [H, M, D]: a function of the key, head, period, feature and dimension alone.

    Args:
        key: int64, 0-dim; see `headway.kernels.random`.
        heads, first_head: which query heads, of all of them.
        period: how often directions were drawn anew, below 2^31.
    """
    head = torch.arange(heads, device=key.device) + first_head
    row = torch.arange(features, device=key.device)
    rows_HM = (period * 2**32 + head * 2**16)[:, None] + row
    return random.normal(key, rows_HM.flatten(), 0, dim).unflatten(0, (heads, features))


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
    features: int = 256,
    redraw: int = 1000,
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
    assert dropout is None
    assert bias_HQK is None
    queries_BHQM, keys_BKSM = _favor_features(q_BHQD, k_BKSD, scale, draw, features, redraw)
    return quadratic(queries_BHQM, keys_BKSM, v_BKSD, mask)


def weights(
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    bias_HQK: Tensor | None = None,
    *,
    draw: Draw,
    features: int = 256,
    redraw: int = 1000,
) -> Tensor:
    """What `reference` averages values by, [B, H, Q, S]."""
    assert bias_HQK is None
    return feature_weights(*_favor_features(q_BHQD, k_BKSD, scale, draw, features, redraw), mask)


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
    features: int = 256,
    redraw: int = 1000,
    by: Average = average,
) -> Tensor:
    """As `reference`, in O((Q + S) M D) time and O((Q + S) D) memory.

    A key's features are divided by the greatest that its document had up to it (see `featured.average`). No epsilon is
    added to features, as the authors' code does, which would tell documents and layouts apart.

    Args:
        by: what averages by features: `featured.average` or a fused form of it.
    """
    assert dropout is None
    assert bias_HQK is None
    q_BHQD, k_BHSD = _scaled(q_BHQD, k_BKSD, scale)
    w_HMD = of_heads(True, q_BHQD, draw, features, redraw)
    return by(FAVOR, q_BHQD, k_BHSD, v_BKSD, mask, w_HMD, _peaks(k_BHSD, w_HMD))


def _scaled(q_BHQD: Tensor, k_BKSD: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Queries, and keys [B, H, S, D], by the root of the scale, in fp32 or wider."""
    wide, root = torch.promote_types(q_BHQD.dtype, torch.float32), score_scale(scale, q_BHQD) ** 0.5
    return q_BHQD.to(wide) * root, per_query_head(k_BKSD.to(wide) * root, q_BHQD)


def _key_logs(k_BHSD: Tensor, w_1HMD: Tensor) -> Tensor:
    """Logarithms of keys' features, [B, H, S, M].

    exp(q . k) is the mean over w of exp(w . q - |q|^2 / 2) exp(w . k - |k|^2 / 2) (lemma 1). A query's |q|^2 is one
    factor of all that it sums: it cancels, and is left out.
    """
    return k_BHSD @ w_1HMD.mT - k_BHSD.square().sum(-1, keepdim=True) / 2


def _favor_features(
    q_BHQD: Tensor, k_BKSD: Tensor, scale: float | None, draw: Draw, features: int, redraw: int
) -> tuple[Tensor, Tensor]:
    """Positive features of queries and keys, up to a factor that cancels: one of each query, and one of all keys."""
    q_BHQD, k_BHSD = _scaled(q_BHQD, k_BKSD, scale)
    with exactly(q_BHQD):
        w_1HMD = of_heads(True, q_BHQD, draw, features, redraw)[None]
        queries, keys = q_BHQD @ w_1HMD.mT, _key_logs(k_BHSD, w_1HMD)
    greatest = keys.detach().amax((-1, -2), keepdim=True)
    return (queries - queries.detach().amax(-1, keepdim=True)).exp(), (keys - greatest).exp()


@torch.no_grad()
def _peaks(k_BHSD: Tensor, w_HMD: Tensor) -> Tensor:
    """Greatest logarithm of each key's features, [B, H, S]."""
    with exactly(k_BHSD):
        width = k_BHSD.shape[0] * w_HMD.shape[0] * w_HMD.shape[1]
        parts = segments(k_BHSD.shape[2], width, k_BHSD.device)
        return torch.cat([_key_logs(k_BHSD[:, :, part], w_HMD[None]).amax(-1) for part in parts], -1)


def _pull_favor(
    x: Tensor, phi: Tensor, d_phi: Tensor, w: Tensor | None, of_keys: bool
) -> tuple[Tensor, None]:
    assert w is not None
    d_logs = d_phi * phi
    dx = d_logs @ w
    return (dx - x * d_logs.sum(-1, keepdim=True) if of_keys else dx), None


def _favor_queries(x: Tensor, w: Tensor | None) -> Tensor:
    assert w is not None
    logs = x @ w.mT
    return logs.sub_(logs.amax(-1, keepdim=True)).exp_()


def _favor_keys(x: Tensor, w: Tensor | None, level: Tensor | None) -> Tensor:
    assert w is not None
    assert level is not None
    # The level is reached, but for rounding, wherever there is a key.
    return _key_logs(x, w).sub_(level).clamp_(max=0).exp_()


FAVOR = Map(_favor_queries, _favor_keys, _pull_favor)


def of_heads(orthogonal: bool, q_BHQD: Tensor, draw: Draw, features: int, redraw: int) -> Tensor:
    """Directions of the query heads that are here, [H, M, D] in fp32 or wider."""
    period = draw.step // redraw if redraw else torch.zeros_like(draw.step)
    sizes = q_BHQD.shape[1], features, q_BHQD.shape[-1], draw.first_head
    return _drawn(draw.key, period, *sizes, orthogonal).to(torch.promote_types(q_BHQD.dtype, torch.float32))


# An operator of its own: for the integers and quantiles in fp64 Inductor (torch 2.13) writes C++ that does not compile,
# and they would be compiled again in every layer.
@torch.library.custom_op("headway::directions", mutates_args=())
def _drawn(
    key: Tensor, period: Tensor, heads: int, features: int, dim: int, first_head: int, orthogonal: bool
) -> Tensor:
    make = orthogonal_directions if orthogonal else directions
    return make(key, heads, features, dim, first_head, period)


@_drawn.register_fake
def _(key, period, heads, features, dim, first_head, orthogonal):
    return key.new_empty(heads, features, dim, dtype=torch.float32)
