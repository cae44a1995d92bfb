"""Tiles of scopes, written out again, are the scopes themselves."""

import pytest
import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention import scopes
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.triton.block_layout import Tiles, block_layout

SCOPES = [
    scopes.Window(9),
    scopes.Dilated(5, 3),
    scopes.Local(32, 1),
    scopes.Strided(16),
    scopes.Comb(16),
    scopes.Fixed(32, 3),
    scopes.Global(20, 5, True),
    scopes.Global(20, 5, False),
    scopes.BigBird(32, 1, 2, random.key(0, "bigbird")),
]


def written(tiles: Tiles, length: int, tile: tuple[int, int], by_keys: bool) -> Tensor:
    """How often a pair of a query and a key is listed, int64 [Q, K]; what is listed wholly counts beyond the ends."""
    blocks = [-(-length // side) for side in tile]
    found = torch.zeros(blocks[0] * tile[0], blocks[1] * tile[1], dtype=torch.int64)
    seen = (tiles.bits[:, :, None] >> torch.arange(tile[1])) & 1
    for own in tiles.order.tolist():
        runs = [
            (tiles.full_starts, tiles.full, None),
            (tiles.partial_starts, tiles.partial, tiles.patterns),
        ]
        for starts, others, patterns in runs:
            for at in range(int(starts[own]), int(starts[own + 1])):
                i, j = (int(others[at]), own) if by_keys else (own, int(others[at]))
                pattern = 1 if patterns is None else seen[patterns[at]]
                found[i * tile[0] : (i + 1) * tile[0], j * tile[1] : (j + 1) * tile[1]] += pattern
    assert not found[:, length:].any(), "keys beyond the end"
    return found[:length, :length]


@pytest.mark.parametrize("tile", [(32, 32), (64, 64), (64, 32)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scope", SCOPES, ids=str)
def test_every_pair_that_is_seen_is_listed_once(
    scope: scopes.Scope, causal: bool, tile: tuple[int, int]
) -> None:
    length, cpu = 230, torch.device("cpu")
    layout = block_layout(causal, scope, length, tile, cpu)
    wanted = lower(Mask(causal, scope=scope), length, length, cpu)
    assert wanted is not None
    for side, by_keys in ((layout.of_queries, False), (layout.of_keys, True)):
        assert torch.equal(written(side, length, tile, by_keys), wanted[0, 0].long())


def test_a_window_is_listed_without_its_empty_tiles_and_with_few_patterns() -> None:
    """Of 64 blocks, a causal window of two blocks' width sees the own one in part, one before it wholly, and less of
    the third: two patterns, and one for the keys that the last block lacks."""
    tiles = block_layout(True, scopes.Window(128), 4095, (64, 64), torch.device("cpu")).of_queries
    assert len(tiles.full) == 63
    assert len(tiles.partial) == 64 + 62
    assert len(tiles.bits) <= 5


def test_blocks_with_most_tiles_come_first() -> None:
    tiles = block_layout(False, scopes.Global(64, 1, True), 1024, (64, 64), torch.device("cpu")).of_queries
    counts = tiles.full_starts.diff() + tiles.partial_starts.diff()
    ordered = counts[tiles.order.long()].tolist()
    assert ordered == sorted(ordered, reverse=True)
    assert ordered[0] == 16
