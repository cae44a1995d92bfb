"""Philox on the host, where nothing is compiled: block by block in numpy, so that words stay in cache.

Philox is some hundred operations on every counter. Each is a call, and a pass over all words: torch's calls cost more
than the arithmetic of a small model, and the words of a large one go to memory and back a hundred times.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np

BLOCK = 1 << 13
"""Counters at once: 64 KiB a word, of which some ten are alive."""

MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)
"""Of counters and keys, from the paper, section 5.3."""

_WORD, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
_M0, _M1 = map(np.uint64, MULTIPLIERS)
_W0, _W1 = map(np.uint64, INCREMENTS)

Array = np.ndarray[Any, Any]
Block = tuple[tuple[slice, ...], tuple[Array, Array, Array, Array]]


def shape_of(*values: Any) -> tuple[int, ...]:
    """What arrays and integers broadcast to."""
    return np.broadcast_shapes(*(np.shape(v) for v in values))


def words(key: Any, counters: tuple[Any, Any, Any, Any]) -> Iterator[Block]:
    """Blocks of what keys and counters broadcast to, each with its four words as uint64.

    Args:
        key: integer or int64 array.
        counters: four integers or int64 arrays, each below 2^32.
    """
    shape = shape_of(key, *counters)
    values = [_aligned(v, len(shape)) for v in (key, *counters)]
    for where in _blocks(shape):
        yield where, _rounds(*(v[_there(v, where)] if v.ndim else v[()] for v in values))


def _aligned(value: Any, dims: int) -> Array:
    """As uint64, of no dims or so many."""
    array = np.asarray(value, dtype=np.int64).view(np.uint64)
    return array.reshape((1,) * (dims - array.ndim) + array.shape) if array.ndim else array


def _there(value: Array, where: tuple[slice, ...]) -> tuple[slice, ...]:
    return tuple(slice(None) if n == 1 else s for n, s in zip(value.shape, where, strict=True))


def _blocks(shape: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a shape into blocks; the last dims stay whole as far as they fit."""
    sides, left = [], BLOCK
    for n in reversed(shape):
        sides.append(max(1, min(n, left)))
        left //= sides[-1]
    steps = [range(0, n, side) for n, side in zip(shape, reversed(sides), strict=True)]
    for begin in product(*steps):
        yield tuple(slice(b, b + s.step) for b, s in zip(begin, steps, strict=True))


def _rounds(key: Any, c0: Any, c1: Any, c2: Any, c3: Any) -> tuple[Array, Array, Array, Array]:
    """Salmon et al. 2011, section 5.3. A product of two words fits into 64 bits."""
    k0, k1 = key & _WORD, key >> _HALF
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c2 = (p1 >> _HALF) ^ c1, (p0 >> _HALF) ^ c3
        c0, c2 = c0 ^ k0, c2 ^ k1
        c1, c3 = p1 & _WORD, p0 & _WORD
        k0, k1 = (k0 + _W0) & _WORD, (k1 + _W1) & _WORD
    return c0, c1, c2, c3
