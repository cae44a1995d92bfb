"""Feed-forward experts applied to chosen tokens, in three ways; `reference` is the specification.

Shapes: N tokens, P token-expert pairs, X experts, C places of an expert, R rows, E hidden size, F feed-forward size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import glu, grouped


class Pairs(NamedTuple):
    """Which expert computes which token.

    Attributes:
        token_P: int64, the token of a pair, in [0, N).
        expert_P: int64, its expert; X where the pair is not computed.
        weight_P: factor of the expert's output.
        place_P: int64, the pair's place among its expert's, in [0, C), unique; any number where it is not computed.
        places: C, or 0 where experts take any number of tokens.
    """

    token_P: Tensor
    expert_P: Tensor
    weight_P: Tensor
    place_P: Tensor | None = None
    places: int = 0


class Weights(NamedTuple):
    """Of all experts; `gate` is given for gated activations."""

    up_XFE: Tensor
    down_XEF: Tensor
    gate_XFE: Tensor | None = None
    up_bias_XF: Tensor | None = None
    down_bias_XE: Tensor | None = None
    gate_bias_XF: Tensor | None = None


def reference(x_NE: Tensor, pairs: Pairs, weights: Weights, activation: str) -> Tensor:
    """Sum over a token's pairs of weight * expert(x): a loop over experts. [N, E] -> [N, E]."""
    y_NE = torch.zeros_like(x_NE)
    each = _unbound(weights, x_NE.dtype)
    for i in range(len(each)):
        mine = (pairs.expert_P == i).nonzero()[:, 0]
        token = pairs.token_P[mine]
        y = _mlp(x_NE[token], each[i], activation, F.linear) * pairs.weight_P[mine, None]
        y_NE = y_NE.index_add(0, token, y.to(x_NE.dtype))
    return y_NE


def sorted_groups(x_NE: Tensor, pairs: Pairs, weights: Weights, activation: str) -> Tensor:
    """Pairs sorted by expert, and one grouped product for all experts; no expert is padded."""
    experts = weights.up_XFE.shape[0]
    expert_R, order_R = pairs.expert_P.sort(stable=True)  # pairs that are not computed come last
    ends_X = torch.searchsorted(expert_R, torch.arange(experts, device=expert_R.device), right=True)
    token_R = pairs.token_P.index_select(0, order_R)

    def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        return grouped.linear(x, w, bias, ends_X)

    y_RE = _mlp(grouped.take_rows(x_NE, token_R), weights, activation, product)
    return grouped.combine_rows(y_RE, pairs.weight_P.index_select(0, order_R), token_R, len(x_NE))


def padded_batches(x_NE: Tensor, pairs: Pairs, weights: Weights, activation: str) -> Tensor:
    """Drop and pad: every expert computes C rows, in one batched product."""
    assert pairs.place_P is not None
    experts, width = weights.up_XFE.shape[0], x_NE.shape[1]
    rows = experts * pairs.places
    # Pairs that are not computed share a row after the last, which is cut off. An empty place computes token 0
    # with weight 0: its output and its gradients are multiplied by zero.
    row_P = torch.where(pairs.expert_P < experts, pairs.expert_P * pairs.places + pairs.place_P, rows)
    token_R = pairs.token_P.new_zeros(rows + 1).scatter(0, row_P, pairs.token_P)[:-1]
    weight_R = pairs.weight_P.new_zeros(rows + 1).scatter(0, row_P, pairs.weight_P)[:-1]

    def product(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
        w = w.to(x.dtype).mT
        return torch.bmm(x, w) if bias is None else torch.baddbmm(bias[:, None].to(x.dtype), x, w)

    x_XCE = grouped.take_rows(x_NE, token_R).view(experts, -1, width)
    y_RE = _mlp(x_XCE, weights, activation, product).view(-1, width)
    return grouped.combine_rows(y_RE, weight_R, token_R, len(x_NE))


KERNELS: dict[str, Callable[[Tensor, Pairs, Weights, str], Tensor]] = {
    "reference": reference,
    "grouped": sorted_groups,
    "batched": padded_batches,
}


def _unbound(weights: Weights, dtype: torch.dtype) -> list[Weights]:
    """Weights of every expert: 2-dim matrices, 1-dim biases."""
    count = len(weights.up_XFE)
    parts = [[None] * count if w is None else w.to(dtype).unbind() for w in weights]
    return [Weights(*one) for one in zip(*parts, strict=True)]


def _mlp(x: Tensor, weights: Weights, activation: str, product: Callable[..., Tensor]) -> Tensor:
    up, down, gate, up_bias, down_bias, gate_bias = weights
    h = product(x, up, up_bias)
    h = glu.PLAIN[activation](h) if gate is None else glu.gated(activation, product(x, gate, gate_bias), h)
    return product(h, down, down_bias)
