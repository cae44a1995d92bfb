"""Routing where a rank has some columns of every row: a row is routed as a whole, and a rank computes its own tokens.

Shapes: B rows, S columns here, T of the whole row, X experts, K experts of a token, P pairs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.experts import Pairs
from headway.parallel.context import layout
from headway.parallel.context.exchange import Team
from headway.pretrain import config
from headway.pretrain.models.routing import Side, route


class RowRouter:
    """Takes the place of `routing.route`: gathers a row's logits, and keeps the pairs of the tokens here.

    Losses and statistics are those of whole rows, equal on all ranks.
    """

    def __init__(self, team: Team) -> None:
        self.team = team

    @torch.compiler.disable
    def __call__(
        self, logits_BSX: Tensor, experts: config.Experts, valid_BT: Tensor, bias_X: Tensor | None = None
    ) -> tuple[Pairs, Side]:
        """See `route`; tokens of pairs are numbered b * S + s. Whole rows of logits are routed as ever."""
        total = valid_BT.shape[1]
        if logits_BSX.shape[1] == total:
            return route(logits_BSX, experts, valid_BT, bias_X)
        pairs, side = route(self.team.gather(logits_BSX, total), experts, valid_BT, bias_X)
        places_S = layout.places(total, self.team.ranks, self.team.rank, logits_BSX.device)
        if experts.routing == "tokens":
            return chosen(pairs, len(valid_BT), total, experts.top_k, places_S), side
        return renumbered(pairs, total, experts.count, places_S), side


def chosen(pairs: Pairs, rows: int, total: int, top_k: int, places_S: Tensor) -> Pairs:
    """Pairs of some columns, where every token has `top_k` of them, in order of tokens."""
    token_B1 = torch.arange(rows, device=places_S.device)[:, None] * total
    of = (
        (token_B1 + places_S).flatten()[:, None] * top_k + torch.arange(top_k, device=places_S.device)
    ).flatten()
    token_P = torch.arange(rows * len(places_S), device=places_S.device).repeat_interleave(top_k)
    place_P = None if pairs.place_P is None else pairs.place_P[of]
    return Pairs(token_P, pairs.expert_P[of], pairs.weight_P[of], place_P, pairs.places)


def renumbered(pairs: Pairs, total: int, experts: int, places_S: Tensor) -> Pairs:
    """All pairs, of which those of other columns are not computed (their expert is X)."""
    index_T = places_S.new_full((total,), -1)
    index_T[places_S] = torch.arange(len(places_S), device=places_S.device)
    here_P = index_T[pairs.token_P % total]
    token_P = pairs.token_P // total * len(places_S) + here_P.clamp(min=0)
    return pairs._replace(token_P=token_P, expert_P=torch.where(here_P >= 0, pairs.expert_P, experts))
