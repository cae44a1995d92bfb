"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1): keys and values from a latent.

A place's latent c and its one rotated key serve all heads: k_h = [W_h^K c; k^R] and v_h = W_h^V c (equations 10, 11,
15, 17), and queries are [q_h; q_h^R] (equation 16). `expanded` makes keys and values and is dense attention, whose
values are narrower than its keys. `absorbed` never makes them: W^K moves into the query and W^V behind the sum, so
that scores and sums run over latents. A pair costs C + R and C where it cost D + R and D, and no key costs anything
more: good for few queries.

Shapes: B batch, H heads, Q queries, S keys, D head dimension, R rotary dimension, C latent's width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention import dense
from headway.kernels.attention.dense import WeightDropout, score_scale
from headway.kernels.attention.masks import Mask, lower

Heads = tuple[Tensor, Tensor, Tensor]
"""Queries, keys and values, as dense attention takes them."""


def expanded(
    q_BHQD: Tensor,
    turned_q_BHQR: Tensor,
    c_BSC: Tensor,
    turned_k_BSR: Tensor,
    k_up_HDC: Tensor,
    v_up_HDC: Tensor,
) -> Heads:
    """Keys of every head [B, H, S, D + R], and its values [B, H, S, D].

    Args:
        q_BHQD, turned_q_BHQR: queries: what meets W^K c, and what meets the shared key; turned already.
        c_BSC, turned_k_BSR: latents, normalised already, and the key that all heads share, turned already.
        k_up_HDC, v_up_HDC: W^K and W^V of every head.
    """
    k_BHSD, v_BHSD = (torch.einsum("bsc,hdc->bhsd", c_BSC, up) for up in (k_up_HDC, v_up_HDC))
    return torch.cat((q_BHQD, turned_q_BHQR), -1), with_shared(k_BHSD, turned_k_BSR), v_BHSD


def with_shared(k_BHSD: Tensor, turned_k_BSR: Tensor) -> Tensor:
    """Keys of every head, with the one that they share: [B, H, S, D + R]."""
    return torch.cat((k_BHSD, turned_k_BSR[:, None].expand(-1, k_BHSD.shape[1], -1, -1)), -1)


def absorbed(
    q_BHQD: Tensor, turned_q_BHQR: Tensor, c_BSC: Tensor, turned_k_BSR: Tensor, k_up_HDC: Tensor
) -> Heads:
    """Queries [B, H, Q, C + R] that have the scores of `expanded` with latents, which are one head's keys and values.

    W^V is then to be applied to what attention gives. The scores' factor must be given: it is of D + R features.
    """
    asked_BHQC = torch.einsum("bhqd,hdc->bhqc", q_BHQD, k_up_HDC)
    k_B1SK = torch.cat((c_BSC, turned_k_BSR), -1)[:, None]
    return torch.cat((asked_BHQC, turned_q_BHQR), -1), k_B1SK, c_BSC[:, None]


def one_head(
    q_BHQD: Tensor,
    k_B1SD: Tensor,
    v_B1SD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQS: Tensor | None = None,
) -> Tensor:
    """`dense.reference` for one key/value head, whose products are of [H Q, D] with [D, S]: no copy for every head.

    Holds H Q S scores: for the few queries of decoding.
    """
    heads, queries, keys = q_BHQD.shape[1], q_BHQD.shape[2], k_B1SD.shape[2]
    scores = (q_BHQD.flatten(1, 2) @ k_B1SD[:, 0].mT).unflatten(1, (heads, queries))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * score_scale(scale, q_BHQD)
    if bias_HQS is not None:
        scores = scores + bias_HQS
    seen = lower(mask, queries, keys, q_BHQD.device)
    if seen is not None:
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    if seen is not None and mask.may_hide_all:
        weights = weights.masked_fill(~seen, 0)
    if dropout is not None:
        kept = dropout.kept(heads, slice(None), slice(0, keys))
        weights = torch.where(kept, weights * random.kept_scale(dropout.p), 0)
    return (weights.to(v_B1SD.dtype).flatten(1, 2) @ v_B1SD[:, 0]).unflatten(1, (heads, queries))


def reference(
    q_BHQD: Tensor,
    turned_q_BHQR: Tensor,
    c_BSC: Tensor,
    turned_k_BSR: Tensor,
    k_up_HDC: Tensor,
    v_up_HDC: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQS: Tensor | None = None,
) -> Tensor:
    """The specification, [B, H, Q, D]; see `expanded` and `dense.reference`. Scores are scaled by (D + R)^-1/2."""
    heads = expanded(q_BHQD, turned_q_BHQR, c_BSC, turned_k_BSR, k_up_HDC, v_up_HDC)
    return dense.reference(*heads, mask, dropout, scale, bias_HQS)
