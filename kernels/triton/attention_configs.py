"""With which tiles attention's Triton kernels are compiled: M queries, N keys.

Chosen so that nothing is spilled and shared memory suffices, of bf16, on any target; see `tuning`.
"""

from __future__ import annotations

from headway.kernels.triton.tuning import Config, Space


def _config(m: int, n: int, warps: int, stages: int) -> Config:
    return Config({"M": m, "N": n}, warps, stages)


def _forward(target: str, width: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [_config(32, 32, 4, 1)] if width <= 128 else [_config(16, 16, 4, 1)]
    if width <= 64:
        return [_config(128, 64, 8, 2), _config(64, 64, 4, 2)]
    if width <= 128:
        return [_config(128, 32, 8, 2), _config(64, 32, 4, 2)]
    return [_config(64, 32, 8, 1), _config(32, 32, 4, 1)]


def _queries(target: str, width: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [_config(32, 32, 4, 1)] if width <= 64 else [_config(16, 16, 4, 1)]
    if width <= 64:
        return [_config(64, 64, 8, 2), _config(64, 32, 4, 2)]
    if width <= 128:
        return [_config(64, 32, 8, 1), _config(32, 32, 4, 1)]
    return [_config(32, 32, 8, 1), _config(16, 32, 4, 1)]


def _keys(target: str, width: int, itemsize: int) -> list[Config]:
    return [
        Config({"M": config.tiles["N"], "N": config.tiles["M"]}, config.warps, config.stages)
        for config in _queries(target, width, itemsize)
    ]


FORWARD = Space("attention_forward", _forward)
QUERIES = Space("attention_queries", _queries)
KEYS = Space("attention_keys", _keys)
BIAS = Space("attention_bias", _queries)
