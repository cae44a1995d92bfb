"""The attention core of a rank that has some columns of every row.

Shapes: see `headway.pretrain.models.attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.entropy import every_row
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scores import Extras
from headway.kernels.attention.slopes import Bias, part_of
from headway.parallel.context import ring, ulysses
from headway.parallel.context.exchange import Team
from headway.parallel.context.layout import cuts
from headway.pretrain.models.attention import Core


class ContextCore(Core):
    """Takes the place of a core; what it is given whole (its mask has no `split`), it computes as that did."""

    def __init__(self, core: Core, team: Team, method: str) -> None:
        torch.nn.Module.__init__(self)
        self.row, self.request, self.scale = core.row, core.request, core.scale
        self.settings = core.settings
        self.team, self.method = team, method

    def forward(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        v_BKMD: Tensor,
        mask: Mask,
        dropout: WeightDropout | None,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Tensor:
        """Returns [B, H, S, D]; the bias is of the queries here and of all keys."""
        compute = super().forward if mask.split is None else self._together
        return compute(q_BHSD, k_BKMD, v_BKMD, mask, dropout, bias_HSM, own)

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
        if self.method == "ring":
            return ring.attention(q, k, v, self._scoped(mask), dropout, self.scale, bias, self.team)
        return ulysses.attention(q, k, v, mask, dropout, bias, own or {}, self.team, super().forward)

    def _scoped(self, mask: Mask) -> Mask:
        """The mask with the mechanism's scope: a ring sends keys only to those who see them."""
        return self.row.part.narrowed(mask, self.settings)

    @torch.compiler.disable
    def entropy(
        self,
        q_BHSD: Tensor,
        k_BKMD: Tensor,
        mask: Mask,
        bias_HSM: Bias | None = None,
        own: Extras | None = None,
    ) -> Tensor:
        """Mean entropy of a sample's rows of weights in nats, [B], of all columns, equal on all ranks."""
        if mask.split is None:
            return super().entropy(q_BHSD, k_BKMD, mask, bias_HSM, own)
        mask = self._scoped(mask)
        assert mask.split is not None
        total = mask.split[0]
        here = self.team.runs(total)
        k_BKTD = self.team.gather(k_BKMD.transpose(1, 2), total).transpose(1, 2)
        sums = q_BHSD.new_zeros(len(q_BHSD), dtype=torch.promote_types(q_BHSD.dtype, torch.float32))
        for run, cut in zip(here, cuts(here), strict=True):
            seen = ring.narrowed(mask, run, range(total))
            bias = None if bias_HSM is None else part_of(bias_HSM, cut)
            rows_BHQ = every_row(q_BHSD[:, :, cut], k_BKTD, seen, self.scale, bias)
            if mask.documents is not None:
                rows_BHQ = torch.where(seen.documents[:, None] >= 0, rows_BHQ, 0)  # type: ignore[index]
            sums = sums + rows_BHQ.sum((1, 2))
        counts = total if mask.documents is None else (mask.documents >= 0).sum(1).clamp(min=1)
        return self.team.sum(sums) / (counts * q_BHSD.shape[1])
