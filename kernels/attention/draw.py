"""What random parts of a mechanism are a function of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels import random


class Draw(NamedTuple):
    """Where a mechanism stands, for numbers from `headway.kernels.random`.

    Attributes:
        key: int64, 0-dim: of the module's name.
        step: int64, 0-dim: optimizer step of the last forward in training.
        noise: int64, 0-dim: key of the module at this step; None outside training.
        slots: int64 [B], the samples' places in the global batch, with `noise`.
        positions: int64 [Q], the queries' places in the sequence, with `noise`.
        first_head: global index of the first query head here.
    """

    key: Tensor
    step: Tensor
    noise: Tensor | None = None
    slots: Tensor | None = None
    positions: Tensor | None = None
    first_head: int = 0

    def gumbel(self, rows: slice, heads: slice, queries: slice, keys: Tensor) -> Tensor | None:
        """Gumbel noise of some rows of the batch, heads and queries, and of keys at these places, [B, H, Q, K] in fp64,
        a function of their global coordinates; None outside training."""
        if self.noise is None or self.slots is None or self.positions is None:
            return None
        heads_H = torch.arange(heads.start, heads.stop, device=keys.device) + self.first_head
        coordinates = (
            self.slots[rows][:, None, None, None],
            heads_H[:, None, None],
            self.positions[queries][:, None],
            keys,
        )
        return -torch.log(-torch.log(random.uniform(self.noise, *coordinates)))
