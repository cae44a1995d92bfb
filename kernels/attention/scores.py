"""Scores: how much a query and a key have to do with each other, before they are weighed.

Most of the literature's scores are products of something made of the queries with something made of the keys: `prepare`
makes it, and any kernel of scaled dot products does the rest. Those that are not have `compute`.

Shapes: B batch, H query heads, K key/value heads (last dim of scores: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import per_query_head

Operands = tuple[Tensor, Tensor, Tensor, float]
"""Queries, keys, values and the factor of the scores."""
Extras = Mapping[str, Any]
"""A mechanism's settings and its own tensors, by name."""


class Score:
    """scale q.k: the scaled dot product, and the base of the others.

    Attributes:
        product: whether `prepare` leaves a scaled dot product of the prepared operands, and nothing follows.
        rows: whether `rows` computes it: such a product, or one with a cap.
        even: whether prepared values are as wide as queries, as most fused kernels want them.
    """

    product = True
    rows = True
    even = True

    def prepare(self, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, scale: float, x: Extras) -> Operands:
        """The operands whose products are the scores."""
        return q_BHQD, k_BKSD, v_BKSD, scale

    def compute(self, q_BHQD: Tensor, k_BKSD: Tensor, scale: float, x: Extras) -> Tensor:
        """Scores of prepared operands [B, H, Q, S], in fp32 or wider, without masks and biases."""
        scores = q_BHQD @ per_query_head(k_BKSD, q_BHQD).mT
        return scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale

    def flops(self, shape: Any, pairs: int) -> float:
        """FLOPs of products beside q.k and weights times values."""
        return 0

    def mix(self, weights_BHQS: Tensor, x: Extras) -> Tensor:
        """What becomes of weights before they meet values."""
        return weights_BHQS

    def finish(self, out_BHQD: Tensor, x: Extras) -> Tensor:
        """What becomes of the output."""
        return out_BHQD


class Temperature(Score):
    """exp(t_h) q.k / sqrt(D), t learned for every head, 0 at first."""

    def prepare(self, q_BHQD, k_BKSD, v_BKSD, scale, x):
        factor_H11 = x["log_temperature"].exp()[:, None, None].to(q_BHQD.dtype)
        return q_BHQD * factor_H11, k_BKSD, v_BKSD, scale


class Cosine(Score):
    """exp(t_h) cos(q, k), t learned for every head (Henry et al. 2020; Swin v2, Liu et al. 2022, equation 2)."""

    def prepare(self, q_BHQD, k_BKSD, v_BKSD, scale, x):
        wide = torch.promote_types(q_BHQD.dtype, torch.float32)
        factor_H11 = x["log_temperature"].exp()[:, None, None].to(wide)
        q = (F.normalize(q_BHQD.to(wide), dim=-1) * factor_H11).to(q_BHQD.dtype)
        return q, F.normalize(k_BKSD.to(wide), dim=-1).to(k_BKSD.dtype), v_BKSD, 1.0


class General(Score):
    """q^T W_h k, without a factor (Luong et al. 2015, section 3.1, `general`)."""

    def prepare(self, q_BHQD, k_BKSD, v_BKSD, scale, x):
        return q_BHQD @ x["score"].to(q_BHQD.dtype), k_BKSD, v_BKSD, 1.0

    def flops(self, shape, pairs):
        return 2 * shape.heads * shape.queries * shape.dim**2


class Dot(Score):
    """q.k, without a factor (Luong et al. 2015, section 3.1, `dot`)."""

    def prepare(self, q_BHQD, k_BKSD, v_BKSD, scale, x):
        return q_BHQD, k_BKSD, v_BKSD, 1.0


class Additive(Score):
    """u_h . tanh(q + k), q and k projected as everywhere (Bahdanau et al. 2015, appendix A.1.2)."""

    product = rows = False

    def compute(self, q_BHQD, k_BKSD, scale, x):
        k_BHSD = per_query_head(k_BKSD, q_BHQD)
        joined = torch.tanh(q_BHQD.unsqueeze(-2) + k_BHSD.unsqueeze(-3))
        scores = (joined * x["direction"].to(joined.dtype)[:, None, None]).sum(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))


class SoftCap(Score):
    """c tanh(scale q.k / c): scores stay within +-c (Gemma 2, 2024, section 2)."""

    product = False

    def compute(self, q_BHQD, k_BKSD, scale, x):
        return torch.tanh(super().compute(q_BHQD, k_BKSD, scale, x) / x["softcap"]) * x["softcap"]


class TalkingHeads(Score):
    """Heads are mixed before and after the softmax (Shazeer et al. 2020)."""

    product = rows = False

    def compute(self, q_BHQD, k_BKSD, scale, x):
        scores = super().compute(q_BHQD, k_BKSD, scale, x)
        return torch.einsum("gh,bhqs->bgqs", x["before"].to(scores.dtype), scores)

    def flops(self, shape, pairs):
        return 4 * shape.heads**2 * pairs

    def mix(self, weights_BHQS, x):
        return torch.einsum("gh,bhqs->bgqs", x["after"].to(weights_BHQS.dtype), weights_BHQS)


class Differential(Score):
    """(softmax(q1.k1) - l softmax(q2.k2)) v, q1 and q2 the halves of q (Ye et al. 2024, section 2.1).

    l = exp(lq1.lk1) - exp(lq2.lk2) + l0 for every head; the output is RMS-normalised per head, without a gain, and
    multiplied by 1 - l0. l0 = 0.8 - 0.6 exp(-0.3 layer).
    """

    even = False

    def prepare(self, q_BHQD, k_BKSD, v_BKSD, scale, x):
        q, k = (torch.cat(t.chunk(2, -1), 1) for t in (q_BHQD, k_BKSD))
        # Two maps of half the width: each is scaled by its own.
        return q, k, torch.cat((v_BKSD, v_BKSD), 1), scale * 2**0.5

    def flops(self, shape, pairs):
        return 2 * shape.heads * shape.dim * pairs  # each of two maps meets whole values

    def finish(self, out_BHQD, x):
        first, second = out_BHQD.chunk(2, 1)
        wide = torch.promote_types(out_BHQD.dtype, torch.float32)
        parts = [x[f"lambda_{name}"].to(wide) for name in ("q1", "k1", "q2", "k2")]
        one, two = ((a * b).sum(-1).exp() for a, b in (parts[:2], parts[2:]))
        first_value = x["first_lambda"]
        factor_H11 = (one - two + first_value)[:, None, None]
        difference = F.rms_norm((first - factor_H11 * second).to(wide), out_BHQD.shape[-1:], eps=1e-5)
        return (difference * (1 - first_value)).to(out_BHQD.dtype)


DOT_PRODUCT = Score()
