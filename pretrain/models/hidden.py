"""What a model gives to an objective.

Shapes: B batch, S sequence, E hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from headway.pretrain.models.routing import Side


class Hidden(NamedTuple):
    """Hidden states, and what blocks give beside.

    Attributes:
        final: [B, S, E], normed: what a head reads. Of an encoder-decoder, the decoder's.
        sides: a block each: losses and statistics of routing and attention, a row each.
        pooled: [B, E], what a classifier of rows reads, or None.
    """

    final: Tensor
    sides: list[Side]
    pooled: Tensor | None = None
