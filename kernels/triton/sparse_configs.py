"""With which tiles the Triton kernels of block-sparse attention and of sparse weights are compiled.

By target and by the width of a head at most: M queries and N keys of a tile, warps, stages. A program owns 64 of what
it writes where tensor cores want as many rows (wgmma, tcgen05). Chosen so that nothing is spilled in bf16, with
documents and dropout too; not tuned by time. Of fp32, whose products are of vector units, tiles are the same
everywhere; heads wider than 128 spill in it on NVIDIA's.
"""

from __future__ import annotations

from headway.kernels.triton.attention_operands import padded
from headway.kernels.triton.tuning import Config, Space

_Choices = dict[int, list[tuple[int, int, int, int]]]
_Tiles = dict[str, dict[str, _Choices]]

BOTH = 128
"""Width of heads up to which a program sums gradients of keys and of values at once: two sums [N, D] in fp32. Of wider
ones they leave no registers for the rest."""

_PART = 64

_WIDE: _Choices = {64: [(32, 32, 8, 1)], 256: [(16, 16, 8, 1)]}
"""Of fp32."""

_BLOCKS: _Tiles = {
    "sm_80": {
        "forward": {64: [(64, 32, 4, 1), (64, 64, 8, 2)], 128: [(64, 32, 4, 1)], 256: [(64, 32, 8, 2)]},
        "query": {64: [(64, 32, 4, 1)], 256: [(64, 32, 8, 2)]},
        "both": {64: [(32, 64, 8, 1)], 128: [(32, 64, 8, 2)]},
        "keys": {256: [(32, 32, 8, 1)]},
        "values": {256: [(32, 32, 8, 1)]},
    },
    "sm_90a": {
        "forward": {64: [(64, 64, 4, 2), (128, 64, 8, 2)], 128: [(128, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "query": {
            64: [(64, 64, 4, 2), (128, 64, 8, 2)],
            128: [(128, 32, 8, 2), (64, 32, 4, 2)],
            256: [(64, 16, 8, 2)],
        },
        "both": {128: [(32, 64, 8, 2)]},
        "keys": {256: [(16, 64, 8, 2)]},
        "values": {256: [(16, 64, 8, 2)]},
    },
    "sm_100a": {
        "forward": {128: [(64, 64, 4, 2), (128, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "query": {128: [(64, 64, 4, 2), (128, 64, 8, 2)], 256: [(64, 16, 8, 2)]},
        "both": {64: [(32, 64, 8, 1)], 128: [(32, 64, 8, 2)]},
        "keys": {256: [(32, 64, 8, 1)]},
        "values": {256: [(64, 64, 8, 1)]},
    },
    "gfx942": {
        "forward": {128: [(64, 64, 4, 1)], 256: [(64, 32, 4, 1)]},
        "query": {128: [(64, 64, 4, 1)], 256: [(64, 32, 4, 1)]},
        "both": {64: [(32, 64, 8, 1)], 128: [(32, 64, 4, 1)]},
        "keys": {256: [(16, 64, 8, 1)]},
        "values": {256: [(16, 64, 8, 1)]},
    },
}

_WEIGHTS: _Tiles = {
    "sm_80": {
        "forward": {64: [(64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "query": {64: [(64, 32, 4, 2)], 128: [(64, 32, 8, 2)], 256: [(32, 64, 8, 1)]},
        "both": {64: [(32, 32, 4, 1)], 128: [(32, 64, 8, 2)]},
        "keys": {256: [(32, 32, 8, 1)]},
        "values": {256: [(64, 32, 8, 1)]},
    },
    "sm_90a": {
        "forward": {128: [(64, 32, 4, 2), (64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "query": {128: [(64, 32, 4, 2), (64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "both": {128: [(32, 64, 8, 2)]},
        "keys": {256: [(16, 64, 8, 2)]},
        "values": {256: [(16, 64, 8, 2)]},
    },
    "sm_100a": {
        "forward": {
            64: [(64, 32, 4, 2), (64, 64, 8, 1)],
            128: [(64, 32, 4, 2)],
            256: [(64, 32, 8, 1)],
        },
        "query": {
            64: [(64, 64, 8, 2), (64, 32, 4, 1)],
            128: [(64, 32, 4, 2), (64, 64, 8, 2)],
            256: [(64, 32, 8, 2)],
        },
        "both": {64: [(32, 64, 8, 1)], 128: [(64, 64, 8, 1)]},
        "keys": {256: [(32, 64, 8, 1)]},
        "values": {256: [(64, 64, 8, 1)]},
    },
    "gfx942": {
        "forward": {64: [(64, 32, 4, 1), (64, 64, 8, 1)], 256: [(64, 32, 4, 1)]},
        "query": {256: [(64, 32, 4, 1)]},
        "both": {64: [(32, 64, 8, 1)], 128: [(32, 64, 4, 1)]},
        "keys": {256: [(16, 64, 8, 1)]},
        "values": {256: [(16, 64, 8, 1)]},
    },
}


def _chosen(choices: _Choices, width: int) -> list[Config]:
    rows = choices[min(most for most in choices if most >= width)]
    return [Config({"M": m, "N": n}, warps, stages) for m, n, warps, stages in rows]


def _space(name: str, kernel: str, tiles: _Tiles) -> Space:
    """Of a kernel whose programs own queries."""

    def configs(target: str, width: int, itemsize: int) -> list[Config]:
        return _chosen(_WIDE if itemsize == 4 else tiles[target][kernel], width)

    return Space(f"{name}_{kernel}", configs)


def _key_space(name: str, tiles: _Tiles) -> Space:
    """Of a kernel whose programs own keys; `of`: which gradients it sums."""

    def configs(target: str, width: int, itemsize: int, of: str) -> list[Config]:
        return _chosen(_WIDE if itemsize == 4 else tiles[target][of], width)

    return Space(f"{name}_key", configs)


BLOCK_FORWARD, BLOCK_QUERIES = (_space("block_sparse", kernel, _BLOCKS) for kernel in ("forward", "query"))
BLOCK_KEYS = _key_space("block_sparse", _BLOCKS)
WEIGHT_FORWARD, WEIGHT_QUERIES = (
    _space("sparse_weights", kernel, _WEIGHTS) for kernel in ("forward", "query")
)
WEIGHT_KEYS = _key_space("sparse_weights", _WEIGHTS)


def columns(width: int, itemsize: int) -> int:
    """By how many columns at once outputs' gradients are multiplied with values: all, padded, or a part of wide heads
    in fp32. There a thread holds whole rows of what stays for all tiles, and two are too many."""
    return _PART if itemsize == 4 and width > BOTH else padded(width)


def key_launches(width: int) -> list[tuple[str, dict[str, bool]]]:
    """Launches of a keys' kernel that together give both gradients, by what they sum, with constants that say so: one,
    or of heads wider than `BOTH` one for each. Those multiply 5 times instead of 4, and walk twice."""
    if width <= BOTH:
        return [("both", {"OF_KEYS": True, "OF_VALUES": True})]
    return [
        ("keys", {"OF_KEYS": True, "OF_VALUES": False}),
        ("values", {"OF_KEYS": False, "OF_VALUES": True}),
    ]
