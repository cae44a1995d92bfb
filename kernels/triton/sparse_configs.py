"""With which tiles the Triton kernels of block-sparse attention and of sparse weights are compiled: both with the same.

By target and by the width of a head at most: M queries and N keys of a tile, warps, stages. A program owns 64 of what
it writes where tensor cores want as many rows (wgmma, tcgen05). Chosen so that nothing is spilled with all that a mask
may have, documents, dropout and grouped keys at once; not tuned by time. In fp32 products are of vector units on
NVIDIA's, whose tiles are much the same there, and of matrix cores on AMD's.
"""

from __future__ import annotations

from functools import partial

from headway.kernels.triton.attention_operands import padded
from headway.kernels.triton.tuning import Config, Space

_Choices = dict[int, list[tuple[int, int, int, int]]]

BOTH = 128
"""Width of heads up to which a program sums gradients of keys and of values at once: two sums [N, D] in fp32. Of wider
ones they leave no registers for the rest."""

_TILES: dict[str, dict[str, _Choices]] = {
    "sm_80": {
        "forward": {128: [(64, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "query": {64: [(64, 32, 4, 2), (64, 32, 8, 2)], 128: [(64, 32, 8, 2)], 256: [(64, 16, 8, 1)]},
        "both": {64: [(16, 64, 4, 1)], 128: [(32, 64, 8, 2)]},
        "keys": {256: [(32, 32, 8, 1)]},
        "values": {256: [(32, 64, 8, 1)]},
    },
    "sm_90a": {
        "forward": {64: [(64, 64, 4, 2), (128, 64, 8, 2)], 128: [(128, 64, 8, 2)], 256: [(64, 32, 8, 2)]},
        "query": {64: [(64, 64, 4, 2), (128, 64, 8, 2)], 128: [(128, 32, 8, 2)], 256: [(64, 16, 8, 2)]},
        "both": {64: [(32, 64, 4, 2), (32, 64, 8, 2)], 128: [(32, 64, 8, 2)]},
        "keys": {256: [(16, 64, 8, 2)]},
        "values": {256: [(16, 64, 8, 2)]},
    },
    "sm_100a": {
        "forward": {128: [(64, 64, 4, 2), (128, 64, 8, 2)], 256: [(64, 32, 8, 1)]},
        "query": {128: [(64, 64, 4, 2), (128, 64, 8, 2)], 256: [(64, 16, 8, 2)]},
        "both": {64: [(32, 64, 8, 1)], 128: [(64, 64, 8, 1)]},
        "keys": {256: [(32, 64, 8, 1)]},
        "values": {256: [(64, 64, 8, 1)]},
    },
    "gfx942": {
        "forward": {128: [(64, 64, 4, 1)], 256: [(64, 32, 4, 1)]},
        "query": {128: [(64, 64, 4, 1)], 256: [(64, 32, 4, 1)]},
        "both": {128: [(32, 64, 4, 1)]},
        "keys": {256: [(16, 64, 8, 1)]},
        "values": {256: [(32, 64, 4, 1)]},
    },
}

_WIDE: dict[str, _Choices] = {
    "forward": {64: [(32, 32, 8, 1)], 256: [(16, 16, 8, 1)]},
    "query": {64: [(16, 32, 8, 1)], 128: [(32, 32, 8, 1)], 256: [(32, 16, 8, 1)]},
    "both": {32: [(16, 32, 8, 1)], 128: [(16, 16, 8, 1)]},
    "keys": {256: [(16, 32, 8, 1)]},
    "values": {256: [(16, 32, 8, 1)]},
}
_WIDE_AMPERE = _WIDE | {"both": {64: [(16, 32, 8, 1)], 128: [(16, 16, 8, 1)]}}
_WIDE_AMD: dict[str, _Choices] = {kernel: {128: [(32, 32, 4, 1)], 256: [(32, 16, 4, 1)]} for kernel in _WIDE}
_OF_FP32 = {"sm_80": _WIDE_AMPERE, "sm_90a": _WIDE, "sm_100a": _WIDE, "gfx942": _WIDE_AMD}


def _configs(kernel: str, target: str, width: int, itemsize: int) -> list[Config]:
    table = (_OF_FP32 if itemsize == 4 else _TILES)[target][kernel]
    rows = table[min(most for most in table if most >= width)]
    return [Config({"M": m, "N": n}, warps, stages) for m, n, warps, stages in rows]


def _space(op: str, kernel: str) -> Space:
    """Of a kernel whose programs own queries."""
    return Space(f"{op}_{kernel}", partial(_configs, kernel))


def _key_space(op: str) -> Space:
    """Of a kernel whose programs own keys; `of`: which gradients it sums."""

    def configs(target: str, width: int, itemsize: int, of: str) -> list[Config]:
        return _configs(of, target, width, itemsize)

    return Space(f"{op}_key", configs)


BLOCK_FORWARD, BLOCK_QUERIES = (_space("block_sparse", kernel) for kernel in ("forward", "query"))
BLOCK_KEYS = _key_space("block_sparse")
WEIGHT_FORWARD, WEIGHT_QUERIES = (_space("sparse_weights", kernel) for kernel in ("forward", "query"))
WEIGHT_KEYS = _key_space("sparse_weights")


def columns(width: int, itemsize: int) -> int:
    """By how many columns at once products over the head dimension are summed in the backward: all, padded, or 64 of
    wider heads in fp32. There a thread holds whole rows of what stays for all tiles, and two are too many."""
    return min(64, padded(width)) if itemsize == 4 else padded(width)


def key_launches(width: int) -> list[tuple[str, dict[str, bool]]]:
    """Launches of a keys' kernel that together give both gradients, by what they sum, with constants that say so: one,
    or of heads wider than `BOTH` one for each. Those multiply 5 times instead of 4, and walk twice."""
    if width <= BOTH:
        return [("both", {"OF_KEYS": True, "OF_VALUES": True})]
    return [
        ("keys", {"OF_KEYS": True, "OF_VALUES": False}),
        ("values", {"OF_KEYS": False, "OF_VALUES": True}),
    ]
