"""With which tiles map distillation's Triton kernels are compiled, by target and by the width of the wider head,
or of what is read of it at once.

A program owns a block of queries (`KEYS`: of keys) and walks over blocks of keys (of queries). It owns 64 at least
where tensor cores want that many rows (wgmma, tcgen05). Chosen so that no loss spills anything, with all conditions of
a mask, both kinds of biases and several teacher heads at once; not tuned by time.
"""

from __future__ import annotations

from headway.kernels.triton.tuning import Config, Space

_Choices = dict[int, list[tuple[int, int, int, int]]]
"""By the width at most: owned, walked, warps, stages."""

_TILES: dict[str, dict[str, _Choices]] = {
    "sm_80": {
        "forward": {64: [(64, 32, 4, 2), (64, 64, 8, 2)], 128: [(64, 32, 8, 2)]},
        "queries": {64: [(64, 32, 4, 2)], 128: [(32, 32, 4, 1)]},
        "keys": {64: [(32, 32, 4, 1)], 128: [(32, 64, 8, 1)]},
        "bias": {64: [(64, 32, 4, 1)], 128: [(64, 32, 8, 1)]},
    },
    "sm_90a": {
        "forward": {64: [(128, 32, 8, 2), (64, 32, 4, 2)], 128: [(128, 32, 8, 2), (64, 32, 4, 2)]},
        "queries": {64: [(128, 32, 8, 2), (64, 32, 4, 2)], 128: [(64, 64, 8, 2), (128, 32, 8, 2)]},
        "keys": {64: [(64, 32, 4, 1), (64, 32, 8, 2)], 128: [(64, 32, 8, 1)]},
        "bias": {64: [(64, 64, 8, 2), (64, 32, 4, 2)], 128: [(64, 32, 8, 1), (64, 64, 8, 1)]},
    },
    "sm_100a": {
        "forward": {64: [(128, 32, 8, 2)], 128: [(64, 64, 8, 1)]},
        "queries": {64: [(64, 32, 4, 2)], 128: [(128, 32, 8, 1)]},
        "keys": {64: [(64, 32, 8, 2), (64, 32, 4, 1)], 128: [(64, 64, 8, 1)]},
        "bias": {64: [(64, 32, 4, 2)], 128: [(64, 32, 8, 1), (64, 64, 8, 1)]},
    },
    "gfx942": {
        "forward": {64: [(64, 64, 4, 1), (64, 32, 4, 1)], 128: [(64, 32, 4, 1)]},
        "queries": {64: [(64, 32, 4, 1)], 128: [(64, 32, 4, 1)]},
        "keys": {64: [(64, 32, 4, 1)], 128: [(64, 32, 4, 1)]},
        "bias": {64: [(64, 32, 4, 1)], 128: [(64, 32, 4, 1)]},
    },
}

_WIDE: dict[str, _Choices] = {
    "forward": {64: [(16, 32, 8, 1)]},
    "queries": {64: [(16, 32, 8, 1)]},
    "keys": {64: [(16, 32, 8, 1)]},
    "bias": {64: [(16, 16, 8, 1)]},
}
"""Of fp32 on NVIDIA's, whose products are of vector units."""
_WIDE_AMD = [(32, 32, 4, 1)]


def _choices(kernel: str, target: str, width: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    if itemsize == 4 and target == "gfx942":
        return _WIDE_AMD
    table = (_WIDE if itemsize == 4 else _TILES[target])[kernel]
    return table[min(most for most in table if most >= width)]


def _space(kernel: str, owned: str, walked: str) -> Space:
    """Of a kernel, and the names of its tiles' sizes."""

    def configs(target: str, width: int, itemsize: int) -> list[Config]:
        most = None if target == "gfx942" else 255
        return [
            Config({owned: own, walked: walk}, warps, stages, most)
            for own, walk, warps, stages in _choices(kernel, target, width, itemsize)
        ]

    return Space(f"map_{kernel}", configs)


FORWARD, QUERIES, BIAS = (_space(kernel, "M", "N") for kernel in ("forward", "queries", "bias"))
KEYS = _space("keys", "N", "M")
