"""Where a token stands: learned tables added to embeddings, or rotations given to every block.

Shapes: S sequence, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.rotary import Rotation, rotation
from headway.pretrain.errors import JobError
from headway.pretrain.models.layers import Embedding


class LearnedPositions(Embedding):
    """A row of weights for every position (GPT-2, BERT)."""

    def forward(self, positions_S: Tensor) -> Tensor:
        """[S] or [B, S] -> [..., E]. Raises JobError where the sequence is longer than the table."""
        if positions_S.shape[-1] > self.num_embeddings:
            rule = f"must not exceed the {self.num_embeddings} rows of the learned position table"
            raise JobError("data.seq_len", positions_S.shape[-1], rule, self.num_embeddings)
        return super().forward(positions_S)


class RotaryPositions:
    """Angles of rotary positions; no parameters, no buffers, so nothing to initialise or to shard."""

    def __init__(self, head_dim: int, base: float) -> None:
        self.head_dim, self.base = head_dim, base

    def __call__(self, positions_S: Tensor, dtype: torch.dtype) -> Rotation:
        """Rotations in fp32, or fp64 for an fp64 model."""
        return rotation(positions_S, self.head_dim, self.base, torch.promote_types(dtype, torch.float32))
