"""Tokens to experts on other ranks and back by Megatron-Core's all-to-all dispatcher; our router chooses, and our
kernels compute.

Shapes: N tokens, P pairs, T rows that arrive for this rank's experts, X experts, L experts of a rank, E hidden size.
"""

from __future__ import annotations

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from headway.kernels.experts import Pairs, Weights
from headway.parallel.dispatch import ExpertDispatcher
from headway.parallel.expert import layers_of
from headway.parallel.mesh import World
from headway.pretrain.models.moe import Dispatcher
from headway.pretrain.objectives import Objective


def take_dispatchers(
    objective: Objective, world: World, groups: ProcessGroupCollection, config: TransformerConfig
) -> None:
    """Give every layer of spread experts Megatron's dispatcher.

    Args:
        config: see `settings.dispatcher`.
    """
    for moe in layers_of(objective):
        ours = moe.dispatcher
        assert isinstance(ours, ExpertDispatcher)
        moe.dispatcher = MegatronDispatcher(ours.inner, world, groups, config)


class MegatronDispatcher(ExpertDispatcher):
    """`ExpertDispatcher` whose rows Megatron sorts, sends and sums.

    Outputs are weighted where they are computed, and a token's are summed in the order of experts and in their own
    dtype, as Megatron does it.
    """

    def __init__(
        self, inner: Dispatcher, world: World, groups: ProcessGroupCollection, config: TransformerConfig
    ) -> None:
        super().__init__(inner, world)
        self.experts: int = config.num_moe_experts
        local = self.experts // self.ranks
        first = local * groups.ep.rank()
        self.theirs = MoEAlltoAllTokenDispatcher(local, list(range(first, first + local)), config, groups)

    def _exchange(self, x_NE: Tensor, pairs: Pairs, mine: Weights) -> Tensor:
        chosen_NX, weight_NX = self._maps(len(x_NE), pairs)
        x, weight = self.theirs.dispatch_preprocess(x_NE, chosen_NX, weight_NX)
        x_TE, counts_L, weight_T = self.theirs.dispatch_postprocess(*self.theirs.token_dispatch(x, weight))
        y_TE = self._compute(x_TE, _sorted(counts_L.tolist(), weight_T), mine)
        y = self.theirs.token_combine(self.theirs.combine_preprocess(y_TE))
        y_NE: Tensor = self.theirs.combine_postprocess(y)
        return y_NE

    def _maps(self, tokens: int, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Which experts compute which tokens, bool [N, X], and the weights of these pairs, [N, X]. Pairs that are not
        computed have a column after the last, which is cut off."""
        where = pairs.token_P, pairs.expert_P
        chosen = torch.zeros(tokens, self.experts + 1, dtype=torch.bool, device=pairs.token_P.device)
        chosen[where] = True
        weight = pairs.weight_P.new_zeros(chosen.shape).index_put(where, pairs.weight_P)
        return chosen[:, :-1].contiguous(), weight[:, :-1]


def _sorted(counts_L: list[int], weight_T: Tensor) -> Pairs:
    """Pairs of rows that lie in order of their experts; every row is its own token."""
    device, most = weight_T.device, max(counts_L)
    counts = torch.tensor(counts_L, device=device)
    expert_T = torch.arange(len(counts_L), device=device).repeat_interleave(counts, output_size=sum(counts_L))
    row_T = torch.arange(len(expert_T), device=device)
    return Pairs(row_T, expert_T, weight_T, row_T - (counts.cumsum(0) - counts)[expert_T], most)
