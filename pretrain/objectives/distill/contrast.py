"""Contrast of representations: a sample's, by the student, is told which of the teacher's belongs to the same sample.

    codir   -log softmax(g)_i, with g_j = z_i . t_j / temperature
    crd     -log h_i - sum_(j != i) log (1 - h_j), with h = e^g / (e^g + 1)

codir is InfoNCE (CoDIR, Sun et al. 2020, equation 4), crd is CRD (Tian et al. 2020, equations 17 to 19) with noise as
large as the data (N = M). z and t are projections of norm 1 of the mean last hidden states. j runs over the global
batch, wherever its rows are, and over a queue of what the teacher made of batches before: so the loss is the same at
every layout.

Shapes: B batch, N samples of the global batch, Q samples of the queue, E the student's hidden size, T the teacher's,
W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headway.pretrain.config.distill import Contrast
from headway.pretrain.models.layers import Linear


class Contrastive(nn.Module):
    """Two projections, and the queue.

    Attributes:
        queue: the teacher's representations of samples before, the newest first [Q, T].
        filled: how many there are, int64, 0-dim.
    """

    queue: Tensor
    filled: Tensor

    def __init__(self, settings: Contrast, student: int, teacher: int) -> None:
        """
        Args:
            settings: of the term.
            student, teacher: hidden sizes.
        """
        super().__init__()
        self.settings = settings
        self.project = Linear(student, settings.width)
        self.project_teacher = Linear(teacher, settings.width)
        if settings.queue:
            self.register_buffer("queue", torch.zeros(settings.queue, teacher))
            self.register_buffer("filled", torch.zeros((), dtype=torch.int64))
        self.newest: Tensor | None = None

    def forward(self, mean_BE: Tensor, others_NT: Tensor, mine_B: Tensor) -> Tensor:
        """Loss of every sample, [B].

        Args:
            mean_BE: by the student.
            others_NT: by the teacher, of the global batch.
            mine_B: int64, the samples' numbers in it.
        """
        self.newest = others_NT
        z_BW = F.normalize(self.project(mean_BE), dim=-1)
        known = (
            others_NT if not self.settings.queue else torch.cat((others_NT, self.queue.to(others_NT.dtype)))
        )
        t_MW = F.normalize(self.project_teacher(known), dim=-1)
        wide = torch.promote_types(z_BW.dtype, torch.float32)
        g_BM = (z_BW @ t_MW.mT).to(wide) / self.settings.temperature
        there_M = torch.arange(len(known), device=g_BM.device) < len(others_NT) + self._filled()
        if self.settings.kind == "codir":
            return F.cross_entropy(g_BM.masked_fill(~there_M, -torch.inf), mine_B, reduction="none")
        is_mine = torch.arange(len(known), device=g_BM.device) == mine_B[:, None]
        each_BM = -F.logsigmoid(torch.where(is_mine, g_BM, -g_BM))  # 1 - h(g) = h(-g)
        return torch.where(there_M, each_BM, 0).sum(1)

    def _filled(self) -> Tensor | int:
        return self.filled if self.settings.queue else 0

    @torch.no_grad()
    def remember(self) -> None:
        """Put the last batch's samples into the queue; after a step."""
        if self.settings.queue and self.newest is not None:
            known = torch.cat((self.newest.to(self.queue.dtype), self.queue))[: len(self.queue)]
            self.queue.copy_(known)
            self.filled.add_(len(self.newest)).clamp_(max=len(self.queue))
        self.newest = None
