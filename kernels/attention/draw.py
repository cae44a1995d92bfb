"""What random parts of a mechanism are a function of."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


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
