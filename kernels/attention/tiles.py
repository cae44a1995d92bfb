"""Masks of places in tiles: which blocks of keys a block of queries is computed with, and what of them is seen.

Shapes: Q queries, K keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scopes import Scope, joined

TILE = 128
"""Queries, and keys, of a tile at most: its scores stay in a core's second cache."""
LANES = 16
"""Tiles are padded to a multiple of it."""


class BlockMask(NamedTuple):
    """Which tiles hold pairs that are seen by their places, and what of them; blocks of keys of every block of queries.

    Attributes:
        starts: int32 [blocks of queries + 1], where the tiles of each begin in the next two.
        columns: int32 [tiles], the block of keys.
        kinds: int32 [tiles], the pattern, or -1 where all is seen.
        patterns: bool [patterns, keys of a tile, queries of a tile].
        tile: queries and keys of a tile.
    """

    starts: Tensor
    columns: Tensor
    kinds: Tensor
    patterns: Tensor
    tile: tuple[int, int]

    @property
    def tensors(self) -> list[Tensor]:
        return [self.starts, self.columns, self.kinds, self.patterns]


@lru_cache(maxsize=64)
def block_mask(
    causal: bool, scope: Scope | None, queries: int, keys: int, tile: tuple[int, int] | None = None
) -> BlockMask:
    """The tiles of a mask of places alone.

    Args:
        causal: whether no query sees a key after it.
        scope: what else bounds what is seen.
        queries, keys: how many there are.
        tile: queries and keys of a tile; by how many there are, if not given.
    """
    tile = tile or (_side(queries), _side(keys))
    mask, cpu = Mask(causal, scope=scope), torch.device("cpu")
    starts, columns, kinds = [0], list[int](), list[int]()
    patterns, numbers = list[Tensor](), dict[bytes, int]()
    for first in range(0, queries, tile[0]):
        rows = slice(first, min(queries, first + tile[0]))
        for j in _candidates(mask, rows, keys, tile[1]):
            columns_ = slice(j * tile[1], min(keys, (j + 1) * tile[1]))
            if scope is None and not (causal and columns_.stop > rows.start + 1):
                seen = None
            else:
                seen = lower(mask, queries, keys, cpu, rows, columns_)
            if seen is not None and not seen.any():
                continue
            columns.append(j)
            kinds.append(-1 if seen is None or seen.all() else _number(seen[0, 0].T, tile, patterns, numbers))
        starts.append(len(columns))
    known = torch.stack(patterns) if patterns else torch.empty(0, tile[1], tile[0], dtype=torch.bool)
    numbered = [torch.tensor(x, dtype=torch.int32) for x in (starts, columns, kinds)]
    return BlockMask(numbered[0], numbered[1], numbered[2], known, tile)


def _side(length: int) -> int:
    return min(TILE, max(1, -(-length // LANES)) * LANES)


def _candidates(mask: Mask, rows: slice, keys: int, width: int) -> list[int]:
    """Blocks of keys of which some query may see one."""
    last = min(keys, rows.stop) if mask.causal else keys
    if mask.scope is None:
        return list(range(-(-last // width)))
    ranges = mask.scope.ranges(range(rows.start, rows.stop), keys, mask.causal)
    return sorted(
        {j for run in joined(ranges, 0, last) for j in range(run.start // width, -(-run.stop // width))}
    )


def _number(seen_KQ: Tensor, tile: tuple[int, int], patterns: list[Tensor], numbers: dict[bytes, int]) -> int:
    """The number of a pattern, which may be new."""
    padded = torch.zeros(tile[1], tile[0], dtype=torch.bool)
    padded[: seen_KQ.shape[0], : seen_KQ.shape[1]] = seen_KQ
    key = padded.numpy().tobytes()
    if key not in numbers:
        numbers[key] = len(patterns)
        patterns.append(padded)
    return numbers[key]
