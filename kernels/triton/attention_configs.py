"""With which tiles attention's Triton kernels are compiled, by target and by the width of a head.

A program owns a block of queries (`KEYS`, `VALUES`: of keys) and walks over blocks of keys (of queries). It owns 64
at least where tensor cores want that many rows (wgmma, tcgen05). Chosen so that nothing is spilled, with a bias, a
cap, a sink, documents and dropout at once; not tuned by time.
"""

from __future__ import annotations

from headway.kernels.triton.tuning import Config, Space

_Choices = dict[int, list[tuple[int, int, int, int]]]
"""By the width at most: owned, walked, warps, stages."""

_HOPPER: dict[str, _Choices] = {
    "forward": {
        64: [(128, 64, 8, 2), (64, 64, 4, 2)],
        128: [(128, 64, 8, 2), (128, 32, 8, 2)],
        256: [(64, 32, 8, 1)],
    },
    "queries": {
        64: [(64, 64, 8, 2), (64, 32, 4, 2)],
        128: [(128, 32, 8, 1), (64, 32, 4, 1)],
        256: [(128, 16, 8, 1)],
    },
    "keys": {64: [(64, 32, 4, 1)], 128: [(128, 16, 8, 1), (64, 16, 4, 1)], 256: [(128, 16, 8, 1)]},
    "values": {256: [(128, 16, 8, 1)]},
    "bias": {64: [(64, 64, 8, 2), (64, 32, 4, 2)], 128: [(64, 32, 4, 1)], 256: [(64, 16, 8, 1)]},
}

_BLACKWELL = _HOPPER | {
    "queries": {
        64: [(128, 64, 8, 2), (64, 32, 4, 2)],
        128: [(128, 64, 8, 1), (64, 32, 8, 1)],
        256: [(64, 16, 4, 1), (128, 16, 8, 1)],
    },
    "keys": {64: [(64, 32, 8, 1)], 128: [(128, 16, 8, 1)], 256: [(64, 16, 8, 1)]},
    "values": {256: [(128, 32, 8, 1)]},
}

_TILES: dict[str, dict[str, _Choices]] = {
    "sm_80": {
        "forward": {64: [(128, 64, 8, 2)], 128: [(128, 32, 8, 2)], 256: [(64, 16, 8, 1), (32, 32, 8, 1)]},
        "queries": {64: [(64, 32, 4, 2)], 128: [(64, 32, 8, 1)], 256: [(32, 32, 8, 1)]},
        "keys": {64: [(32, 32, 4, 1), (64, 16, 4, 1)], 128: [(32, 32, 4, 1)], 256: [(32, 32, 8, 1)]},
        "values": {256: [(64, 16, 8, 1), (32, 32, 8, 1)]},
        "bias": {64: [(64, 32, 4, 1)], 128: [(64, 32, 8, 1)], 256: [(32, 16, 4, 1)]},
    },
    "sm_90a": _HOPPER,
    "sm_100a": _BLACKWELL,
    "gfx942": {
        "forward": {64: [(128, 64, 4, 1), (64, 64, 4, 1)], 128: [(64, 64, 4, 1)], 256: [(64, 32, 4, 1)]},
        "queries": {64: [(64, 32, 4, 1), (128, 32, 4, 1)], 128: [(64, 32, 4, 1)], 256: [(32, 32, 4, 1)]},
        "keys": {64: [(64, 32, 4, 1)], 128: [(64, 32, 4, 1), (32, 32, 4, 1)], 256: [(32, 32, 4, 1)]},
        "values": {256: [(64, 32, 4, 1), (32, 32, 4, 1)]},
        "bias": {64: [(64, 32, 4, 1)], 128: [(64, 32, 4, 1)], 256: [(32, 32, 4, 1)]},
    },
}

_WIDE: dict[str, _Choices] = {
    "forward": {64: [(32, 32, 8, 1)], 128: [(32, 16, 8, 1)], 256: [(16, 16, 4, 1)]},
    "queries": {64: [(32, 32, 8, 1)], 128: [(32, 16, 8, 1)], 256: [(16, 16, 4, 1)]},
    "keys": {64: [(32, 32, 8, 1)], 128: [(32, 16, 4, 1)], 256: [(16, 16, 4, 1)]},
    "values": {256: [(16, 16, 4, 1)]},
    "bias": {64: [(32, 32, 8, 1)], 128: [(32, 16, 8, 1)], 256: [(16, 16, 8, 1)]},
}
"""Of fp32 on NVIDIA's, whose products are of vector units."""
_WIDE_AMD: _Choices = {64: [(32, 32, 4, 1), (32, 16, 4, 1)], 128: [(32, 16, 4, 1)], 256: [(16, 16, 4, 1)]}


def _choices(kernel: str, target: str, width: int, itemsize: int) -> list[tuple[int, int, int, int]]:
    table = _TILES[target][kernel]
    if itemsize == 4:
        table = _WIDE_AMD if target == "gfx942" else _WIDE[kernel]
    return table[min(most for most in table if most >= width)]


def _space(kernel: str, owned: str, walked: str) -> Space:
    """Of a kernel, and the names of its tiles' sizes."""

    def configs(target: str, width: int, itemsize: int) -> list[Config]:
        most = (
            255 if itemsize == 4 and width <= 64 and target != "gfx942" else None
        )  # wider ones take all there are
        return [
            Config({owned: own, walked: walk}, warps, stages, most)
            for own, walk, warps, stages in _choices(kernel, target, width, itemsize)
        ]

    return Space(f"attention_{kernel}", configs)


def _delta_configs(target: str, width: int, itemsize: int) -> list[Config]:
    """Some 32 numbers a thread; nothing depends on the target."""
    return [Config({"M": max(16, size // width)}, 4, 1) for size in (4096, 2048)]


FORWARD, QUERIES, BIAS = (_space(kernel, "M", "N") for kernel in ("forward", "queries", "bias"))
KEYS, VALUES = (_space(kernel, "N", "M") for kernel in ("keys", "values"))
"""Of gradients of keys, with values or alone; of values alone."""
DELTA = Space("attention_delta", _delta_configs)
