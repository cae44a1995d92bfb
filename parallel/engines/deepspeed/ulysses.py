"""Ulysses attention by DeepSpeed's own exchange (`deepspeed.sequence.layer.DistributedAttention`; Jacobs et al. 2023).

It wants as many columns on every rank, and takes them for neighbours: here they are in zigzag order, and are put in
order between the exchanges. Where ranks have unlike numbers of columns, our exchange takes its place, which computes
the same numbers.

Shapes: B batch, H query heads, K key/value heads, D head dimension, S queries here, M keys here, Q queries and T keys
of the whole; h heads of a rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scores import Extras
from headway.kernels.attention.slopes import Bias
from headway.parallel.context import layout, ulysses
from headway.parallel.context.core import ContextCore
from headway.parallel.context.exchange import Team
from headway.pretrain.models.attention import Core


def exchange_by_deepspeed(root: nn.Module) -> None:
    """Let the cores below `root` that exchange heads for columns do so by DeepSpeed."""
    for module in root.modules():
        if isinstance(module, ContextCore) and module.method == "ulysses":
            module.__class__ = DistributedCore


class DistributedCore(ContextCore):
    """The attention core of a rank that has some columns of every row."""

    @torch.compiler.disable
    def _together(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        dropout: WeightDropout | None,
        bias: Bias | None,
        own: Extras | None,
    ) -> Tensor:
        assert mask.split is not None
        if any(len(set(self.team.sizes(total))) > 1 for total in mask.split):
            return super()._together(q, k, v, mask, dropout, bias, own)

        def kernel(q: Tensor, k: Tensor, v: Tensor, *others: object) -> Tensor:
            return Core.forward(self, q, k, v, *others)  # type: ignore[arg-type]

        given = (q, k, v, mask, dropout, bias, own or {})
        return ulysses.attention(*given, self.team, kernel, trade=traded)


def traded(
    q_BHSD: Tensor, k_BKMD: Tensor, v_BKMD: Tensor, totals: tuple[int, int], team: Team, kernel: ulysses.Local
) -> Tensor:
    """`ulysses.traded` by DeepSpeed's exchange: [B, H, S, D]."""
    from deepspeed.sequence.layer import DistributedAttention

    (queries, keys), device = totals, q_BHSD.device
    order_Q, order_T = (layout.by_rank(total, team.ranks, device) for total in (queries, keys))

    def whole(q_BQhD: Tensor, k_BThD: Tensor, v_BThD: Tensor) -> Tensor:
        q = q_BQhD.transpose(1, 2)[:, :, order_Q.argsort()]
        k, v = (x.transpose(1, 2)[:, :, order_T.argsort()] for x in (k_BThD, v_BThD))
        y_BhQD = kernel(q, k, v)
        return y_BhQD[:, :, order_Q].transpose(1, 2)

    attend = DistributedAttention(whole, team.group, scatter_idx=2, gather_idx=1)
    y_BSHD: Tensor = attend(*(x.transpose(1, 2).contiguous() for x in (q_BHSD, k_BKMD, v_BKMD)), 0)
    return y_BSHD.transpose(1, 2)
