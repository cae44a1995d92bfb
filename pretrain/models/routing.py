"""Which experts compute which tokens, and the losses and statistics of that choice.

A row of the batch is the group of GShard: capacity, expert choice and balance are decided within it, over its valid
tokens, so that nothing depends on the rows beside it, on micro-batches or on padding.

Shapes: B rows, S tokens of a row, X experts, K experts of a token, C places of an expert in a row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from headway.kernels.experts import Pairs
from headway.pretrain import config

Side = dict[str, Tensor]

_TINY = 1e-20  # keeps sums of sigmoid scores from zero, as in DeepSeek-V3


def route(
    logits_BSX: Tensor, experts: config.Experts, valid_BS: Tensor, bias_X: Tensor | None = None
) -> tuple[Pairs, Side]:
    """Pairs of tokens and experts.

    Args:
        logits_BSX: of the router, fp32 or wider.
        valid_BS: bool; other tokens are padding, which gets no expert and counts nowhere.
        bias_X: added to scores where experts are selected, not where outputs are weighted (Wang et al. 2024).

    Returns:
        Pairs, with tokens numbered b * S + s, and, a number (or X of them) for every row:
        `balance`, X sum_i f_i P_i with f the share of choices that fall on an expert before capacity and bias, P the
        mean of its normalised score (Switch, equation 4; DeepSeek-V3, equation 17): 1 for a uniform router.
        `router_z`, mean of the squared logsumexp of logits (ST-MoE, equation 5).
        `load` [B, X], pairs computed; `dropped`, pairs dropped by capacity; `router_entropy`, mean entropy of
        normalised scores in nats. Losses are differentiable, statistics are not.
    """
    if experts.score == "softmax":
        scores_BSX = share_BSX = logits_BSX.softmax(-1)
    else:
        scores_BSX = logits_BSX.sigmoid()
        share_BSX = scores_BSX / (scores_BSX.sum(-1, keepdim=True) + _TINY)
    if experts.routing == "tokens":
        pairs, wanted_BX, load_BX = tokens_choose(scores_BSX, experts, valid_BS, bias_X)
    else:
        pairs, load_BX = experts_choose(scores_BSX, experts, valid_BS)
        wanted_BX = load_BX
    if bias_X is not None:
        wanted_BX = _count(scores_BSX.topk(experts.top_k).indices, valid_BS, experts.count)

    tokens_B = valid_BS.sum(1).clamp(min=1)

    def mean(x_BS: Tensor) -> Tensor:
        return torch.where(valid_BS, x_BS, 0).sum(1) / tokens_B

    f_BX = wanted_BX / wanted_BX.sum(-1, keepdim=True).clamp(min=1)
    p_BX = torch.where(valid_BS[..., None], share_BSX, 0).sum(1) / tokens_B[:, None]
    chosen_B = valid_BS.sum(1) * experts.top_k if experts.routing == "tokens" else load_BX.sum(-1)
    return pairs, {
        "balance": experts.count * (f_BX.to(p_BX.dtype) * p_BX).sum(-1),
        "router_z": mean(logits_BSX.logsumexp(-1).square()),
        "load": load_BX.to(p_BX.dtype),
        "dropped": (chosen_B - load_BX.sum(-1)).to(p_BX.dtype),
        "router_entropy": mean(torch.special.entr(share_BSX.detach()).sum(-1)),
    }


def tokens_choose(
    scores_BSX: Tensor, experts: config.Experts, valid_BS: Tensor, bias_X: Tensor | None
) -> tuple[Pairs, Tensor, Tensor]:
    """Every token takes its K best experts. Returns pairs, and choices and computed pairs of experts [B, X].

    Where an expert has more tokens than places, the earlier ones have them (Switch; Megatron's drop policy
    "position"). First choices do not go before second ones, as in GShard, and likely ones not before unlikely ones,
    Megatron's default: a token's output would then depend on later tokens.
    """
    b, s, x = scores_BSX.shape
    k = experts.top_k
    ranking_BSX = scores_BSX if bias_X is None else scores_BSX + bias_X.to(scores_BSX.dtype)
    chosen_BSK = ranking_BSX.topk(k).indices
    weight_BSK = scores_BSX.gather(-1, chosen_BSK)
    if experts.normalise:
        weight_BSK = weight_BSK / (weight_BSK.sum(-1, keepdim=True) + _TINY)

    wanted_BX = load_BX = _count(chosen_BSK, valid_BS, x)
    kept_BSK, place_P, places = valid_BS[..., None], None, 0
    if experts.capacity is not None:
        limit_B, places = _capacity(experts, valid_BS)
        place_BSK = _places(chosen_BSK, valid_BS, x)
        kept_BSK = kept_BSK & (place_BSK < limit_B[:, None, None])
        load_BX = wanted_BX.minimum(limit_B[:, None])
        row_B11 = torch.arange(b, device=place_BSK.device)[:, None, None]
        place_P = (row_B11 * places + place_BSK).flatten()
    token_P = torch.arange(b * s, device=chosen_BSK.device)[:, None].expand(-1, k).flatten()
    expert_P = torch.where(kept_BSK, chosen_BSK, x).flatten()
    return Pairs(token_P, expert_P, weight_BSK.flatten(), place_P, b * places), wanted_BX, load_BX


def experts_choose(scores_BSX: Tensor, experts: config.Experts, valid_BS: Tensor) -> tuple[Pairs, Tensor]:
    """Every expert takes the C tokens of a row that score it best (Zhou et al. 2022). Returns pairs and [B, X]."""
    b, s, x = scores_BSX.shape
    limit_B, places = _capacity(experts, valid_BS)
    scores_BXS = torch.where(valid_BS[:, None], scores_BSX.mT, -1)  # scores are positive: padding comes last
    weight_BXC, chosen_BXC = scores_BXS.topk(places)
    kept_B1C = torch.arange(places, device=limit_B.device) < limit_B[:, None, None]
    row_B11 = torch.arange(b, device=limit_B.device)[:, None, None]
    token_BXC = row_B11 * s + chosen_BXC
    if experts.normalise:
        sums = weight_BXC.new_zeros(b * s)
        sums = sums.index_add(0, token_BXC.flatten(), torch.where(kept_B1C, weight_BXC, 0).flatten())
        weight_BXC = weight_BXC / (sums[token_BXC] + _TINY)
    expert_BXC = torch.where(kept_B1C, torch.arange(x, device=limit_B.device)[:, None], x)
    place_BXC = (row_B11 * places + torch.arange(places, device=limit_B.device)).expand(b, x, places)
    pairs = Pairs(
        token_BXC.flatten(), expert_BXC.flatten(), weight_BXC.flatten(), place_BXC.flatten(), b * places
    )
    return pairs, limit_B[:, None].expand(b, x)


def _capacity(experts: config.Experts, valid_BS: Tensor) -> tuple[Tensor, int]:
    """Places of an expert in every row, [B], and in a row without padding: ceil(K S / X capacity), at most S."""

    def even(tokens):
        return tokens * experts.top_k / experts.count * (experts.capacity or 1.0)

    tokens_B, longest = valid_BS.sum(1), valid_BS.shape[1]
    return even(tokens_B.double()).ceil().long().minimum(tokens_B), min(longest, math.ceil(even(longest)))


def _count(chosen_BSK: Tensor, valid_BS: Tensor, experts: int) -> Tensor:
    """Valid tokens that chose each expert, int64 [B, X]."""
    votes_BSK = valid_BS[..., None].expand_as(chosen_BSK).long()
    return votes_BSK.new_zeros(len(valid_BS), experts).scatter_add(
        1, chosen_BSK.flatten(1), votes_BSK.flatten(1)
    )


def _places(chosen_BSK: Tensor, valid_BS: Tensor, experts: int) -> Tensor:
    """How many earlier valid tokens of the row chose the same expert, int64 [B, S, K]."""
    one_hot_BSX = (
        chosen_BSK.new_zeros(*valid_BS.shape, experts).scatter(-1, chosen_BSK, 1) * valid_BS[..., None]
    )
    return (one_hot_BSX.cumsum(1) - one_hot_BSX).gather(-1, chosen_BSK)
