"""Which tiles of queries and keys a scope leaves, as kernels that skip the others walk through them.

Tiles that are seen wholly and tiles that are seen in part are listed apart, so that kernels check pairs in the latter
alone. What is seen of a tile is a pattern of bits; tiles that look alike share one: memory grows with the tiles.

Shapes: M queries and N keys of a tile, P patterns, T tiles; I blocks of whoever walks: queries, or keys.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.scopes import Scope
from headway.kernels.attention.tiles import block_mask

BITS = 64
"""Keys of a tile at most: a query's are one number."""


class Tiles(NamedTuple):
    """The tiles of every block of queries, or of keys; types are Any as kernels are given it too.

    Attributes:
        order: int32 [I], the blocks, those with most tiles first: what takes longest begins first.
        full_starts, partial_starts: int32 [I + 1], where the tiles of each block begin below.
        full: int32 [T], of tiles that are seen wholly, the block on the other side.
        partial: int32 [T], the same of tiles that are seen in part.
        patterns: int32 [T], what is seen of the latter.
        bits: int64 [P, M]; bit n of a number: whether the query sees the tile's n-th key.
    """

    order: Any
    full_starts: Any
    full: Any
    partial_starts: Any
    partial: Any
    patterns: Any
    bits: Any


class Layout(NamedTuple):
    """The same tiles by blocks of queries, and by blocks of keys."""

    of_queries: Tiles
    of_keys: Tiles


@lru_cache(maxsize=64)
def block_layout(
    causal: bool, scope: Scope, length: int, tile: tuple[int, int], device: torch.device
) -> Layout:
    """The tiles of a scope over a sequence, on a device.

    Built once, on the host, from the blocks of keys that `Scope.ranges` names.

    Args:
        causal: whether no query sees a key after it.
        scope: what else bounds what is seen.
        length: of the sequence.
        tile: M and N, the latter at most `BITS`.
    """
    known = block_mask(causal, scope, length, length, tile)
    columns, kinds, patterns = known.columns.long(), known.kinds.clone(), known.patterns.mT
    rows = torch.repeat_interleave(torch.arange(len(known.starts) - 1), known.starts.diff().long())
    if beyond := length % tile[1]:  # keys that are not there are not seen
        kinds[(kinds == -1) & (columns == length // tile[1])] = len(patterns)
        edge = (torch.arange(tile[1]) < beyond).expand(1, tile[0], tile[1])
        patterns = torch.cat([patterns, edge])
    bits = (patterns.long() << torch.arange(tile[1])).sum(-1)
    sides = (
        _tiles(rows, columns, kinds, bits, -(-length // tile[0])),
        _tiles(columns, rows, kinds, bits, -(-length // tile[1])),
    )
    return Layout(*(Tiles(*(x.to(device) for x in side)) for side in sides))


def _tiles(own: Tensor, other: Tensor, kinds: Tensor, bits: Tensor, blocks: int) -> Tiles:
    """Tiles by their block on one side, in the order of the other."""
    order = torch.argsort(torch.bincount(own, minlength=blocks), descending=True, stable=True)
    found = list[Tensor]()
    for chosen in (kinds == -1, kinds != -1):
        ours, theirs, what = (x[chosen] for x in (own, other, kinds))
        by_block = torch.argsort(ours, stable=True)
        ends = torch.bincount(ours, minlength=blocks).cumsum(0)
        found += [torch.cat([ends.new_zeros(1), ends]), theirs[by_block], what[by_block]]
    full_starts, full, _, partial_starts, partial, patterns = found
    lists = (order, full_starts, full, partial_starts, partial, patterns)
    return Tiles(*(*(x.to(torch.int32) for x in lists), bits))
