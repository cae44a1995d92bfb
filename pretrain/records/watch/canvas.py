"""Curves of characters: a canvas of Braille dots, and sparklines of blocks.

A Braille sign has 2 x 4 dots; Unicode counts them from U+2800 with one bit each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bits of the dots of a sign: rows from above, columns from the left."""
BLOCKS = "▁▂▃▄▅▆▇█"


class Canvas:
    """`width` x `height` signs; dots are counted from the lower left, and those outside are left out."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._signs = [[0] * width for _ in range(height)]

    def dot(self, x: int, y: int) -> None:
        row = 4 * self.height - 1 - y
        if 0 <= x < 2 * self.width and 0 <= row < 4 * self.height:
            self._signs[row // 4][x // 2] |= DOTS[row % 4][x % 2]

    def curve(self, heights: Sequence[float]) -> None:
        """Heights in dots, one a column of dots; neighbours are joined, NaN leaves a gap."""
        before = math.nan
        for x, height in enumerate(heights):
            if math.isfinite(height):
                joined = math.isfinite(before)
                middle = (before + height) / 2 if joined else height
                self._column(x, middle, height)
                if joined:  # each of two neighbours draws its half of the way
                    self._column(x - 1, before, middle)
            before = height

    def _column(self, x: int, start: float, end: float) -> None:
        low, high = sorted((round(start), round(end)))
        for y in range(max(low, 0), min(high, 4 * self.height - 1) + 1):
            self.dot(x, y)

    def lines(self, ascii_only: bool = False) -> list[str]:
        """The rows of signs from above."""
        if ascii_only:
            return ["".join("*" if sign else " " for sign in row) for row in self._signs]
        return ["".join(chr(0x2800 + sign) if sign else " " for sign in row) for row in self._signs]


def averages(y: NDArray, parts: int) -> NDArray[np.float64]:
    """Means of the finite values of equal parts of a curve, in order; NaN where a part has none."""
    if not len(y):
        return np.full(parts, np.nan)
    place = np.arange(len(y)) * parts // len(y)
    return _averages(place, y, parts)


def averages_over(x: NDArray, y: NDArray, limits: tuple[float, float], parts: int) -> NDArray[np.float64]:
    """Means of the finite values in equal parts of a range of x; where curves have few points, those between are
    interpolated."""
    keep = np.isfinite(y)
    x, y = np.asarray(x, dtype=float)[keep], np.asarray(y, dtype=float)[keep]
    if not len(x):
        return np.full(parts, np.nan)
    low, high = limits
    place = np.clip(((x - low) / max(high - low, 1e-9) * parts).astype(int), 0, parts - 1)
    found = _averages(place, y, parts)
    there = np.flatnonzero(np.isfinite(found))
    inside = np.arange(there[0], there[-1] + 1)
    found[inside] = np.interp(inside, there, found[there])
    return found


def _averages(place: NDArray, y: NDArray, parts: int) -> NDArray[np.float64]:
    finite = np.isfinite(y)
    sums = np.bincount(place[finite], weights=y[finite], minlength=parts)
    counts = np.bincount(place[finite], minlength=parts)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, sums / counts, np.nan)


def sparkline(y: NDArray, width: int) -> str:
    """A curve in one line; a blank where there is nothing finite. Its ends are where all but one in fifty values lie:
    a single slow step would flatten the others."""
    found = averages(y, min(width, len(y)))
    finite = found[np.isfinite(found)]
    if not len(finite):
        return ""
    low, high = (float(end) for end in np.quantile(finite, (0.02, 0.98)))
    span = high - low or math.inf  # a level curve lies at the bottom
    return "".join(
        BLOCKS[max(0, min(7, int((v - low) / span * 8)))] if math.isfinite(v) else " " for v in found
    )
