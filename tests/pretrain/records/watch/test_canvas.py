"""Dots become the signs that Unicode has for them."""

import math
import unicodedata

import numpy as np
import pytest

from headway.pretrain.records.watch.canvas import Canvas, averages, averages_over, sparkline

PLACES = {(0, 3): 1, (0, 2): 2, (0, 1): 3, (1, 3): 4, (1, 2): 5, (1, 1): 6, (0, 0): 7, (1, 0): 8}
"""Dot from the lower left -> its number, of which Unicode's names are made (BRAILLE PATTERN DOTS-17)."""


@pytest.mark.parametrize("place", PLACES)
def test_each_dot_is_where_unicode_says(place):
    canvas = Canvas(1, 1)
    canvas.dot(*place)
    (sign,) = canvas.lines()
    assert unicodedata.name(sign) == f"BRAILLE PATTERN DOTS-{PLACES[place]}"


def dots(canvas: Canvas) -> set[tuple[int, int]]:
    """Dots that are set, from the names of the signs."""
    found = set()
    for row, line in enumerate(canvas.lines()):
        for column, sign in enumerate(line):
            if sign == " ":
                continue
            numbers = unicodedata.name(sign).removeprefix("BRAILLE PATTERN DOTS-")
            for (x, y), number in PLACES.items():
                if str(number) in numbers:
                    found.add((2 * column + x, 4 * (canvas.height - 1 - row) + y))
    return found


def test_a_curve_goes_through_its_heights_without_holes():
    heights = [0, 7, 7, 3, math.nan, 2, 1]
    canvas = Canvas(4, 2)
    canvas.curve(heights)
    found = dots(canvas)
    assert all((x, y) in found for x, y in enumerate(heights) if y == y)
    assert not any(x == 4 for x, _ in found)
    for x in (0, 1, 2, 5):  # neighbours touch
        near = {(y, z) for a, y in found if a == x for b, z in found if b == x + 1 and abs(y - z) <= 1}
        assert near
    assert all(min(heights) <= y <= 7 for _, y in found)


def test_what_is_outside_is_left_out():
    canvas = Canvas(2, 1)
    canvas.curve([-50, 90, 2, 2, 2, 2])
    assert canvas.lines()[0] == "⣿⠒" or len(canvas.lines()[0]) == 2
    assert Canvas(2, 1).lines() == ["  "]
    assert set("".join(canvas.lines(ascii_only=True))) == {"*"}


def test_averages_are_those_of_numpy():
    y = np.random.default_rng(0).normal(size=1000)
    assert np.allclose(averages(y, 10), y.reshape(10, 100).mean(1))
    y[3] = np.nan
    assert np.isclose(averages(y, 10)[0], np.nanmean(y[:100]))
    assert np.isnan(averages(np.full(4, np.nan), 2)).all()
    x = np.arange(1, 1001)
    assert np.allclose(averages_over(x, y, (1, 1001), 10)[1:], y.reshape(10, 100).mean(1)[1:])
    assert averages_over(np.array([0, 10]), np.array([1.0, 2.0]), (0, 10), 11) == pytest.approx(
        np.linspace(1, 2, 11)
    )


def test_a_sparkline_spans_its_range_and_survives_everything():
    assert sparkline(np.arange(8.0), 8) == "▁▂▃▄▅▆▇█"
    assert sparkline(np.ones(5), 3) == "▁▁▁"
    assert sparkline(np.array([]), 5) == ""
    assert sparkline(np.array([np.nan, np.inf]), 5) == ""
    assert sparkline(np.array([1.0, np.nan, 3.0]), 3) == "▁ █"
    spiked = np.r_[np.arange(100.0), 1e9, np.arange(100.0)]
    assert set(sparkline(spiked, 201)) == set("▁▂▃▄▅▆▇█")
