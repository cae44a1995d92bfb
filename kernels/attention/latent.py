"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1): keys and values from a latent.

A place's latent c and its one rotated key serve all heads: k_h = [W_h^K c; k^R] and v_h = W_h^V c (equations 10, 11,
15, 17), and queries are [q_h; q_h^R] (equation 16). `expanded` makes keys and values and is dense attention, whose
values are narrower than its keys. `absorbed` never makes them: W^K moves into the query and W^V behind the sum, so
that scores and sums run over latents. A pair costs C + R and C where it cost D + R and D, and no key costs anything
more: good for few queries.

Shapes: B batch, H heads, Q queries, S keys, D head dimension, R rotary dimension, C latent's width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention import dense
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask, lower

Core = Callable[..., Tensor]
"""Dense attention: (q, k, v, mask, dropout, scale, bias) -> [B, H, Q, D]; see `dense.reference`."""


def expanded(
    q_BHQD: Tensor,
    rotary_q_BHQR: Tensor,
    c_BSC: Tensor,
    rotary_k_BSR: Tensor,
    k_up_HDC: Tensor,
    v_up_HDC: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQS: Tensor | None = None,
    *,
    core: Core = dense.reference,
) -> Tensor:
    """The specification where `core` is the reference; returns [B, H, Q, D].

    Args:
        q_BHQD, rotary_q_BHQR: queries: what meets W^K c, and what meets the rotated key; rotated already.
        c_BSC, rotary_k_BSR: latents, normalised already, and the key that all heads share, rotated already.
        k_up_HDC, v_up_HDC: W^K and W^V of every head.
        mask, dropout, bias_HQS: as in `dense.reference`.
        scale: factor of the products; 1 / sqrt(D + R) if None.
        core: computes dense attention with values of another width than keys.
    """
    k_BHSD, v_BHSD = (torch.einsum("bsc,hdc->bhsd", c_BSC, up) for up in (k_up_HDC, v_up_HDC))
    return core(
        torch.cat((q_BHQD, rotary_q_BHQR), -1),
        with_shared(k_BHSD, rotary_k_BSR),
        v_BHSD,
        mask,
        dropout,
        scale,
        bias_HQS,
    )


def with_shared(k_BHSD: Tensor, rotary_k_BSR: Tensor) -> Tensor:
    """Keys of all heads, [B, H, S, D + R]."""
    return torch.cat((k_BHSD, rotary_k_BSR[:, None].expand(-1, k_BHSD.shape[1], -1, -1)), -1)


def absorbed(
    q_BHQD: Tensor,
    rotary_q_BHQR: Tensor,
    c_BSC: Tensor,
    rotary_k_BSR: Tensor,
    k_up_HDC: Tensor,
    v_up_HDC: Tensor,
    mask: Mask,
    dropout: WeightDropout | None = None,
    scale: float | None = None,
    bias_HQS: Tensor | None = None,
) -> Tensor:
    """The same from latents alone (section 2.1.2): what a cache holds is C + R numbers a place, for all heads.

    Holds H Q S scores; products are of [H Q, C + R] with [C + R, S], without a copy for every head.
    """
    heads, (queries, dim), keys = q_BHQD.shape[1], q_BHQD.shape[2:], c_BSC.shape[1]
    scale = 1 / math.sqrt(dim + rotary_q_BHQR.shape[-1]) if scale is None else scale
    asked_BHQC = torch.einsum("bhqd,hdc->bhqc", q_BHQD, k_up_HDC)
    scores = (asked_BHQC.flatten(1, 2) @ c_BSC.mT + rotary_q_BHQR.flatten(1, 2) @ rotary_k_BSR.mT).unflatten(
        1, (heads, -1)
    )
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
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
    mean_BHQC = (weights.to(c_BSC.dtype).flatten(1, 2) @ c_BSC).unflatten(1, (heads, -1))
    return torch.einsum("bhqc,hdc->bhqd", mean_BHQC, v_up_HDC)


def pair_flops(heads: int, dim: int, rotary: int, rank: int, pairs: int) -> tuple[int, int]:
    """Forward FLOPs of so many pairs of a query and a key: `expanded`, whose keys cost 4 H D C each beside, and
    `absorbed`, whose queries do."""
    return 2 * heads * pairs * (2 * dim + rotary), 2 * heads * pairs * (2 * rank + rotary)
