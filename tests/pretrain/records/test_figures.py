"""Curves: valid SVG, the page's colours, the data as it is."""

import json
import math
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from headway.pretrain.records.figures import Curve, draw

SVG = "{http://www.w3.org/2000/svg}"


def reading(picture) -> dict:
    return json.loads(ET.fromstring(str(picture)).attrib["data-reading"])


def test_a_picture_is_inline_svg_in_the_colours_of_the_page():
    picture = str(draw([Curve("a", [1, 2, 3], [1.0, 4.0, 2.0])], "k", width=480, height=190))
    root = ET.fromstring(picture)  # well-formed
    assert root.tag == SVG + "svg"
    assert root.attrib["viewBox"].split() == ["0", "0", "480", "190"]
    assert "var(--accent)" in picture
    assert "#01" not in picture
    assert "#03" not in picture
    assert [t.text for t in root.iter(SVG + "text")]  # text stays text
    assert not [e for e in root.iter() if e.attrib.get("id", "").startswith(("figure", "axes", "text"))]


def test_the_pointer_reads_the_values():
    curve = reading(draw([Curve("a", [1, 2, 3], [1.0, math.nan, 2.0])], "k", width=480, height=190))
    assert curve["curves"] == [{"name": "a", "colour": "var(--accent)", "x": [1, 2, 3], "y": [1, None, 2]}]
    assert curve["y"][0] < 1 < 2 < curve["y"][1]


def test_sparse_points_leave_gaps_out():
    values = [math.nan, 3.0, math.nan, 2.0]
    (curve,) = reading(draw([Curve("e", [1, 2, 3, 4], values, points=True)], "k", width=9e2, height=190))[
        "curves"
    ]
    assert (curve["x"], curve["y"]) == ([2, 4], [3, 2])


def test_long_runs_are_thinned_to_their_means():
    y = np.arange(60_000, dtype=float)
    picture = draw([Curve("a", range(60_000), y.tolist(), smooth=True)], "k", width=480, height=190)
    (curve,) = reading(picture)["curves"]
    assert len(curve["x"]) == 600
    assert curve["y"][0] == pytest.approx(49.5)  # the mean of the first hundred
    assert curve["x"][-1] == 59_999
    assert len(str(picture)) < 120_000


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf]])
def test_nothing_to_draw_is_no_picture(values):
    assert draw([Curve("a", list(range(len(values))), values)], "k", width=480, height=190) is None


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [1e-300, 2e-300], [1.0] * 9 + [math.inf]])
@pytest.mark.parametrize("smooth", [True, False])
def test_odd_data_is_drawn(values, smooth):
    curve = Curve("a", list(range(len(values))), values, smooth=smooth)
    assert draw([curve], "k", width=480, height=190, zero=True)
