"""The order of samples: computed from a key, never stored.

`Permutation` answers "which row comes n-th?" for a corpus of any size in constant time and memory. `Blend`
answers "which source does draw i come from, and which of its samples is it?" in closed form. Neither knows
ranks, micro-batches or workers, so the order is the same on every layout.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

ROUNDS = 8
MAX_SIZE = 1 << 62
SHARE_BITS = 32


def make_key(*parts: int | str) -> int:
    """A 128-bit key that depends on all parts and on nothing else, the same on every platform and release."""
    text = json.dumps(parts, ensure_ascii=True, separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


class Permutation:
    """A keyed bijection of `range(size)`: constant memory, and constant expected time per index.

    A balanced Feistel network of eight rounds over pairs (left, right) of numbers below a = ceil(sqrt(size)),
    with sums modulo a in place of xor (Black and Rogaway 2002, "Ciphers with arbitrary finite domains",
    section 5), permutes range(a^2). An image outside range(size) is sent through again until it falls inside
    (cycle walking, section 4 of the same). Since a^2 < size + 2 sqrt(size) + 1, walks are rare: a corpus of a
    million rows takes one in two thousand images through twice.

    It shuffles; it keeps no secrets.

    Args:
        size: number of elements, 1 to 2^62.
        key: any integer of 0 to 2^128 - 1; see `make_key`.

    Raises:
        ValueError: size or key out of range, or (when called) an index outside `range(size)`.
    """

    def __init__(self, size: int, key: int) -> None:
        if not 1 <= size <= MAX_SIZE:
            raise ValueError(f"size of a permutation must be 1 to 2^62, not {size}")
        if not 0 <= key < 1 << 128:
            raise ValueError(f"key of a permutation must have at most 128 bits and no sign, not {key}")
        self.size = size
        self.side = np.uint64(math.isqrt(size - 1) + 1)
        digest = hashlib.blake2b(key.to_bytes(16, "little"), digest_size=8 * ROUNDS, person=b"headway.order")
        self.round_keys = np.frombuffer(digest.digest(), dtype="<u8").astype(np.uint64)

    def __call__(self, index: ArrayLike) -> Ints:
        """Images of the indices: int64 of the same shape."""
        return self._walk(index, self._forward)

    def inverse(self, image: ArrayLike) -> Ints:
        """Indices whose images these are: `inverse(permutation(i)) == i`."""
        return self._walk(image, self._backward)

    def _walk(self, index: ArrayLike, network: Callable[[Words], Words]) -> Ints:
        index = np.asarray(index, dtype=np.int64)
        if index.size and (index.min() < 0 or index.max() >= self.size):
            raise ValueError(f"index outside of the permutation's range({self.size})")
        size = np.uint64(self.size)
        value = network(index.reshape(-1).astype(np.uint64))
        outside = np.flatnonzero(value >= size)
        while outside.size:
            value[outside] = network(value[outside])
            outside = outside[value[outside] >= size]
        return value.astype(np.int64).reshape(index.shape)

    def _forward(self, value: Words) -> Words:
        left, right = np.divmod(value, self.side)
        for key in self.round_keys:
            left, right = right, (left + _mix(right + key) % self.side) % self.side
        return left * self.side + right

    def _backward(self, value: Words) -> Words:
        left, right = np.divmod(value, self.side)
        for key in self.round_keys[::-1]:
            left, right = (right + self.side - _mix(left + key) % self.side) % self.side, left
        return left * self.side + right


def _mix(x: Words) -> Words:
    """Finalizer of SplitMix64 (Steele, Lea and Flood 2014; constants of Stafford's variant 13)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blend:
    """A weighted blend of sources: draw i -> (source, index within that source), in closed form.

    The sources are leaves of a balanced binary tree. A node whose left branch has share p of its weight sends
    floor(p n + 1/2) of its first n draws to the left and the others to the right, evenly spread. So every
    source is consumed in order without gaps or repeats, and after any number of draws the count of each
    differs from its share by at most half a draw per level of the tree. Shares are fixed-point numbers of 32
    bits, so that all of this is exact in integers.

    Weights may change in mid-run (`reweighted`): the state is the draw at which they began and how much of
    each source had been consumed by then.

    Args:
        weights: one positive number per source; only their ratios matter.
        start: draw at which these weights began.
        consumed: samples of each source that earlier draws took; none if not given. Sums to `start`, less
            what was taken from sources that are gone.

    Raises:
        ValueError: no source, a weight that is not positive and finite, or counts that do not fit.
    """

    def __init__(
        self, weights: Sequence[float], start: int = 0, consumed: Sequence[int] | None = None
    ) -> None:
        if not weights or not all(math.isfinite(w) and w > 0 for w in weights):
            raise ValueError(f"weights of a blend must be positive and finite, not {list(weights)}")
        self.weights = tuple(float(w) for w in weights)
        self.start = start
        self.consumed = tuple(consumed) if consumed is not None else (0,) * len(weights)
        if len(self.consumed) != len(self.weights) or start < 0 or min(self.consumed) < 0:
            raise ValueError(f"start {start} and consumed {self.consumed} do not fit {len(weights)} sources")

    def place(self, draws: ArrayLike) -> tuple[Ints, Ints]:
        """Source of each draw and its place in the order of that source: two int64 arrays like `draws`."""
        draws = np.asarray(draws, dtype=np.int64)
        if draws.size and draws.min() < self.start:
            raise ValueError(f"draw {draws.min()} lies before draw {self.start}, where this blend begins")
        flat = draws.reshape(-1) - self.start
        source, index = np.zeros_like(flat), np.zeros_like(flat)
        self._descend(0, len(self.weights), np.arange(flat.size), flat, source, index)
        index += np.array(self.consumed, dtype=np.int64)[source]
        return source.reshape(draws.shape), index.reshape(draws.shape)

    def counts(self, draw: int) -> tuple[int, ...]:
        """Samples of each source that draws 0 to `draw` - 1 took."""
        if draw < self.start:
            raise ValueError(f"draw {draw} lies before draw {self.start}, where this blend begins")
        drawn = self._split(0, len(self.weights), draw - self.start)
        return tuple(before + n for before, n in zip(self.consumed, drawn, strict=True))

    def reweighted(self, draw: int, weights: Sequence[float]) -> Blend:
        """The blend that goes on from `draw` with other weights; every source goes on where it was."""
        return Blend(weights, draw, self.counts(draw))

    def _share(self, first: int, last: int) -> tuple[int, int]:
        """Middle of a node's leaves and the left branch's share of its weight, in units of 2^-32."""
        middle = (first + last) // 2
        left, right = math.fsum(self.weights[first:middle]), math.fsum(self.weights[middle:last])
        one = 1 << SHARE_BITS
        return middle, min(max(round(left / (left + right) * one), 1), one - 1)

    def _descend(self, first: int, last: int, where: Ints, n: Ints, source: Ints, index: Ints) -> None:
        if last - first == 1:
            source[where], index[where] = first, n
            return
        if not where.size:
            return
        middle, share = self._share(first, last)
        before = _portion(n, share)
        left = _portion(n + 1, share) > before
        self._descend(first, middle, where[left], before[left], source, index)
        self._descend(middle, last, where[~left], (n - before)[~left], source, index)

    def _split(self, first: int, last: int, n: int) -> tuple[int, ...]:
        if last - first == 1:
            return (n,)
        middle, share = self._share(first, last)
        left = int(_portion(np.array(n, dtype=np.int64), share))
        return self._split(first, middle, left) + self._split(middle, last, n - left)


def _portion(n: Ints, share: int) -> Ints:
    """floor(n share / 2^32 + 1/2), exact for n below 2^62: the product is taken in two halves."""
    n = n.astype(np.uint64)
    bits, half = np.uint64(SHARE_BITS), np.uint64(1 << (SHARE_BITS - 1))
    high, low = n >> bits, n & np.uint64((1 << SHARE_BITS) - 1)
    return (high * np.uint64(share) + ((low * np.uint64(share) + half) >> bits)).astype(np.int64)
