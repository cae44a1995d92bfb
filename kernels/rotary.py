"""Rotary position embedding (Su et al. 2021), in the half-split layout of Llama and Hugging Face.

Feature i turns with feature i + D/2. The paper's own layout turns neighbours (2i, 2i + 1) instead: the two are a
permutation of weights apart, and not interchangeable.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from headway.kernels.fused import fused


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, fp32 (fp64 for fp64) [S, D/2] or [B, S, D/2]."""

    cos: Tensor
    sin: Tensor


class Stretch(NamedTuple):
    """How angles are made smaller, so that a sequence may be longer than those that a model has seen.

    Attributes:
        kind: `linear`, all of them (Chen et al. 2023, position interpolation); `ntk`, by a larger base, so that the
            fastest stay and the slowest become `factor` times slower (bloc97 2023); `yarn`, those that turn less than
            `slow` times over the original length, not those that turn more than `fast` times, a ramp over features
            between (Peng et al. 2024, section 3.2); `llama3`, the same with other bounds and a ramp over turns.
        factor: how many times longer.
        original: tokens of the sequences that the model has seen; of `yarn` and `llama3`.
        slow, fast: turns over the original length: 1 and 32 (yarn), 1 and 4 (llama3).
        whole: the ramp of yarn begins and ends at whole features, as in its code.
        magnitude: factor of cosines and sines, hence of queries and keys; if None, yarn's 0.1 ln(factor) + 1.
    """

    kind: Literal["linear", "ntk", "yarn", "llama3"]
    factor: float
    original: int = 0
    slow: float = 1.0
    fast: float = 32.0
    whole: bool = True
    magnitude: float | None = None


def rotation(
    positions: Tensor,
    dim: int,
    base: float,
    dtype: torch.dtype = torch.float32,
    stretch: Stretch | None = None,
) -> Rotation:
    """Angles position / base^(2i / dim), computed in fp64: fp32 angles are off by 1e-3 at position 10^4.

    Args:
        positions: int64 [S] or [B, S].
        dim: head dimension, even.
        base: 10,000 in the paper.
        stretch: for longer sequences than a model has seen.
    """
    angles = positions.double().unsqueeze(-1) * frequencies(dim, base, stretch, positions.device)
    size = 1.0 if stretch is None else magnitude(stretch)
    return Rotation((angles.cos() * size).to(dtype), (angles.sin() * size).to(dtype))


def frequencies(
    dim: int, base: float, stretch: Stretch | None = None, device: torch.device | None = None
) -> Tensor:
    """Radians from one position to the next of each pair of features, fp64 [dim / 2]."""
    exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=device) / dim
    if stretch is None:
        return base**-exponents
    if stretch.kind == "ntk":
        return stretched_base(dim, base, stretch.factor) ** -exponents
    plain = base**-exponents
    if stretch.kind == "linear":
        return plain / stretch.factor
    if stretch.kind == "llama3":
        turns = stretch.original * plain / (2 * math.pi)
        kept = ((turns - stretch.slow) / (stretch.fast - stretch.slow)).clamp(0, 1)
    else:
        # The feature pairs, of which there are dim / 2, that turn `fast` and `slow` times over the original length.
        ends = [
            dim / 2 * math.log(stretch.original / (turns * 2 * math.pi), base)
            for turns in (stretch.fast, stretch.slow)
        ]
        first, last = (math.floor(ends[0]), math.ceil(ends[1])) if stretch.whole else ends
        first, last = max(first, 0), min(last, dim - 1)
        pair = torch.arange(dim // 2, dtype=torch.float64, device=device)
        kept = 1 - ((pair - first) / max(last - first, 0.001)).clamp(0, 1)
    return plain * (kept + (1 - kept) / stretch.factor)


def magnitude(stretch: Stretch) -> float:
    """Factor of cosines and sines (Peng et al. 2024, equation 22: its square is that of the scores)."""
    if stretch.kind != "yarn":
        return 1.0
    if stretch.magnitude is not None:
        return stretch.magnitude
    return 0.1 * math.log(stretch.factor) + 1 if stretch.factor > 1 else 1.0


def stretched_base(dim: int, base: float, factor: float) -> float:
    """The base of which the slowest pair is `factor` times slower, and the fastest the same."""
    return base * factor ** (dim / (dim - 2))


def rotate(x: Tensor, turn: Rotation) -> Tensor:
    """Turn feature pairs of x [B, H, S, D] by each position's angles; returns x's dtype."""
    cos, sin = (t if t.dim() == 2 else t.unsqueeze(1) for t in turn)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


def rotate_both(q: Tensor, k: Tensor, turn: Rotation) -> tuple[Tensor, Tensor]:
    """`rotate` of queries and of keys, in one launch on GPUs; either may be at the first places of `turn` alone."""
    if fused(q, k, *turn):
        from headway.kernels.triton import rotary as fast

        return fast.rotate(q, k, turn)
    first, second = (rotate(x, Rotation(*(t[..., : x.shape[2], :] for t in turn))) for x in (q, k))
    return first, second
