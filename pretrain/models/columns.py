"""Which columns of a sequence a model is given, where others are elsewhere (context parallelism).

Shapes: B batch, S columns that are here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Columns(NamedTuple):
    """Some columns of a sequence.

    Attributes:
        places_S: int64, their places in it.
        total: columns of the whole sequence; None if these are all.
    """

    places_S: Tensor
    total: int | None = None

    @classmethod
    def of(cls, columns: Columns | None, given: Tensor) -> Columns:
        """The columns, or 0, 1, ... of the given [B, S, ...] if None."""
        return columns or cls(torch.arange(given.shape[1], device=given.device))

    @property
    def split(self) -> tuple[int, int] | None:
        """What a mask of this sequence's attention to itself says of it; see `Mask.split`."""
        return None if self.total is None else (self.total, self.total)

    @property
    def all_S(self) -> Tensor:
        """Places of the whole sequence, int64 [total]."""
        if self.total is None:
            return self.places_S
        return torch.arange(self.total, device=self.places_S.device)

    def cut(self, x: Tensor) -> Tensor:
        """Those that are here of all columns [B, total, ...]."""
        return x if self.total is None else x[:, self.places_S]
