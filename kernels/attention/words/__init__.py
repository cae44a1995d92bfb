"""All words that `model.attention.mechanism` knows: rows of the registry, a file for every kind."""

from __future__ import annotations

from headway.kernels.attention.linear import low_rank
from headway.kernels.attention.registry import Mechanism
from headway.kernels.attention.words import content, grids, linear, mixers, scopes, scores, weights

ROWS: tuple[Mechanism, ...] = (
    *scopes.ROWS,
    *scores.ROWS,
    *weights.ROWS,
    *linear.ROWS,
    *low_rank.ROWS,
    *mixers.ROWS,
    *grids.ROWS,
    *content.ROWS,
)
"""In the order of `headway attention ls`."""
