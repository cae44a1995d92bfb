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


class SinusoidalPositions(torch.nn.Module):
    def __init__(self, width):
        super().__init__(); self.width = width
    def forward(self, positions_S):
        i = torch.arange(0, self.width, 2, dtype=torch.float64, device=positions_S.device)
        a = positions_S.double()[..., None] * 10000.0 ** (-i / self.width)
        return torch.stack((a.sin(), a.cos()), -1).flatten(-2).float()


class SinusoidalGrid(torch.nn.Module):
    def __init__(self, width, side, first=False):
        super().__init__(); self.width, self.side, self.first = width, side, first
    def forward(self, positions_S):
        w = torch.arange(self.width // 4, dtype=torch.float64, device=positions_S.device) / (self.width / 4)
        w = 10000.0 ** -w
        g = torch.arange(self.side, dtype=torch.float64)
        ys, xs = torch.meshgrid(g, g, indexing="ij")
        parts = [f(v.flatten()[:, None] * w) for v in (xs, ys) for f in (torch.sin, torch.cos)]
        t = torch.cat(parts, 1)
        if self.first:
            t = torch.cat((torch.zeros(1, self.width, dtype=t.dtype), t))
        return t[positions_S].float()


class RelativeBias(torch.nn.Module):
    def __init__(self, model, bidirectional):
        super().__init__(); self.b = bidirectional
        self.table = Embedding(model.relative_buckets, model.heads); self.n = model.relative_buckets; self.m = model.relative_distance
    def forward(self, q, k):
        from transformers.models.t5.modeling_t5 import T5Attention
        rel = k[None] - q[:, None]
        bucket = T5Attention._relative_position_bucket(rel, self.b, self.n, self.m)
        return self.table(bucket).permute(2, 0, 1)
