"""Where a token stands: rows added to embeddings, rotations given to every block, or a bias of the scores.

Shapes: B batch, S sequence, E hidden size, H query heads, Q queries, K keys, P patches.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from headway.kernels.attention.slopes import Slopes, geometric
from headway.kernels.rotary import Rotation, Stretch, rotation
from headway.pretrain import config
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


class SinusoidalPositions:
    """Sines and cosines of the position (Vaswani et al. 2017, section 3.5); no parameters.

    Features alternate, sin at 2i and cos at 2i + 1, as the paper writes. Marian and Hugging Face's port of it hold
    all sines first, then all cosines: a permutation of features apart, and not interchangeable.
    """

    def __init__(self, hidden: int, base: float = 10000.0) -> None:
        self.hidden, self.base = hidden, base

    def __call__(self, positions_S: Tensor, dtype: torch.dtype) -> Tensor:
        """int64 [S] or [B, S] -> [..., E] of `dtype`; angles are computed in fp64."""
        pair = torch.stack(_sines(positions_S, self.hidden, self.base), -1)
        return pair.flatten(-2)[..., : self.hidden].to(dtype)


class SinusoidalGrid:
    """Sines and cosines of a patch's column and row (MoCo v3, Chen et al. 2021; MAE, He et al. 2022); no parameters.

    A quarter of the features each: sin and cos of the column, sin and cos of the row, as MAE has them. Patches go
    row by row. timm's `build_sincos2d_pos_embed(interleave_sin_cos=True)` holds the row's half first.
    """

    def __init__(self, hidden: int, base: float = 10000.0) -> None:
        if hidden % 4:
            nearest = 4 * max(1, round(hidden / 4))
            raise JobError(
                "model.hidden", hidden, "two-dimensional sine positions need a multiple of 4", nearest
            )
        self.hidden, self.base = hidden, base

    def __call__(
        self, rows: int, columns: int, dtype: torch.dtype, device: torch.device, before: int = 0
    ) -> Tensor:
        """[before + P, E] for P = rows x columns: rows of zeros for the tokens before the patches, then the patches."""
        place = torch.arange(rows * columns, device=device)
        axes = (place % columns, place // columns)
        parts = [part for axis in axes for part in _sines(axis, self.hidden // 2, self.base)]
        return nn.functional.pad(torch.cat(parts, -1), (0, 0, before, 0)).to(dtype)


def stretch_of(scaling: config.RotaryScaling) -> Stretch | None:
    """How the config wants rotary angles to be stretched."""
    if scaling.kind == "none":
        return None
    fast = scaling.fast or (4.0 if scaling.kind == "llama3" else 32.0)
    sizes = scaling.factor, scaling.original_length or 0, scaling.slow or 1.0, fast
    return Stretch(scaling.kind, *sizes, scaling.whole, scaling.attention_factor)


class RotaryPositions:
    """Angles of rotary positions; no parameters, no buffers, so nothing to initialise or to shard."""

    def __init__(self, head_dim: int, base: float, stretch: Stretch | None = None) -> None:
        self.head_dim, self.base, self.stretch = head_dim, base, stretch

    def __call__(self, positions_S: Tensor, dtype: torch.dtype) -> Rotation:
        """Rotations in fp32, or fp64 for an fp64 model."""
        wide = torch.promote_types(dtype, torch.float32)
        return rotation(positions_S, self.head_dim, self.base, wide, self.stretch)


class LinearBias:
    """ALiBi: scores fall with the distance, by a slope of each head (Press et al. 2022, section 3); to both sides alike
    in encoders, which the paper leaves open. No parameters."""

    def __init__(self, heads: int) -> None:
        self.slopes = geometric(heads)

    def __call__(self, queries_Q: Tensor, keys_K: Tensor, dtype: torch.dtype) -> Slopes:
        """What describes the bias of all heads; its slopes are fp32, or fp64 for an fp64 model."""
        wide = torch.promote_types(dtype, torch.float32)
        return Slopes(torch.tensor(self.slopes, dtype=wide, device=queries_Q.device), queries_Q, keys_K)


class RelativeBias(nn.Module):
    """A learned bias of attention scores for every head and bucket of distances (T5, Raffel et al. 2020, section 2.1).

    Half of a direction's buckets hold one distance each, the others grow logarithmically up to `distance`, and all
    that lies beyond shares the last. A bidirectional bias gives the upper half of the buckets to keys after the
    query; otherwise such keys (which a causal mask hides) share bucket 0.
    """

    def __init__(self, heads: int, buckets: int, distance: int) -> None:
        """Raises JobError for too few buckets, or a distance that buckets of one distance each already cover."""
        super().__init__()
        if buckets < 4:
            raise JobError(
                "model.relative_buckets", buckets, "two directions need at least 2 buckets each", 4
            )
        if distance <= buckets // 2:
            rule = "must exceed half of model.relative_buckets, which hold one distance each"
            raise JobError("model.relative_distance", distance, rule, buckets // 2 + 1)
        self.one_way, self.both_ways = (bucket_starts(count, distance) for count in (buckets, buckets // 2))
        self.table = Embedding(buckets, heads)

    def forward(self, queries_Q: Tensor, keys_K: Tensor, bidirectional: bool) -> Tensor:
        """Positions int64 [Q] and [K] -> bias [H, Q, K] of the table's dtype."""
        bias_QKH: Tensor = self.table(self.buckets(queries_Q, keys_K, bidirectional))
        return bias_QKH.permute(2, 0, 1).contiguous()  # every layer reads it

    def buckets(self, queries_Q: Tensor, keys_K: Tensor, bidirectional: bool) -> Tensor:
        """Rows of the table, int64 [Q, K]."""
        ahead_QK = keys_K[None, :] - queries_Q[:, None]
        starts = torch.tensor(self.both_ways if bidirectional else self.one_way, device=ahead_QK.device)
        if not bidirectional:
            return torch.bucketize(-ahead_QK, starts, right=True)
        after_QK = (ahead_QK > 0) * (self.table.num_embeddings // 2)
        return torch.bucketize(ahead_QK.abs(), starts, right=True) + after_QK


def bucket_starts(count: int, distance: int) -> list[int]:
    """The smallest distance of bucket 1, 2, ..., count - 1 of one direction.

    A table of integers, and not the logarithm itself in the model, so that devices and compilers whose logarithms
    differ in the last bit agree on a bucket. The table is T5's own formula, in fp32 as T5 computes it.
    """
    exact = count // 2
    places = torch.arange(exact, distance + 1, device="cpu")
    growth = torch.log(places.float() / exact) / math.log(distance / exact) * (count - exact)
    bucket = (exact + growth.long()).clamp(max=count - 1)
    first = torch.searchsorted(bucket, torch.arange(exact, count, device="cpu")) + exact
    return [*range(1, exact), *first.tolist()]


def _sines(places: Tensor, width: int, base: float) -> tuple[Tensor, Tensor]:
    """sin and cos of place / base^(2i / width) for i below width / 2, rounded up, in fp64."""
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=places.device) / width
    angles = places.double().unsqueeze(-1) * base**-exponents
    return angles.sin(), angles.cos()
