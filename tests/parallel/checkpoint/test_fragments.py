"""Fragments: any run of any part is covered once, by boxes whose views are the live values."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.parallel.checkpoint.fragments import Fragment
from headway.parallel.checkpoint.layout import held


@st.composite
def runs(draw):
    part = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    count = math.prod(part)
    start = draw(st.integers(0, count))
    return part, start, draw(st.integers(start, count))


@settings(deadline=None, max_examples=300)
@given(runs())
def test_a_run_is_cut_into_boxes_that_hold_its_values(case):
    part, start, stop = case
    whole = tuple(n + 3 for n in part)
    offset = tuple(range(min(3, len(part)))) + (0,) * (len(part) - 3)
    values = torch.arange(math.prod(part))
    fragment = Fragment(values[start:stop].clone(), whole, offset, part, start)
    found = torch.full(part, -1)
    for held_part in held({"w": fragment}):
        box = held_part.box
        place = tuple(slice(o - p, o - p + n) for o, p, n in zip(box.offset, offset, box.shape, strict=True))
        assert (found[place] == -1).all()
        found[place] = held_part.view
        held_part.view.fill_(-7)
    expected = torch.full((math.prod(part),), -1)
    expected[start:stop] = values[start:stop]
    assert torch.equal(found.reshape(-1), expected)
    assert (fragment.run == -7).all()  # views of the live values


def test_there_are_few_boxes():
    values = torch.arange(1000.0)
    assert len(held({"w": Fragment(values, (100, 10), (0, 0), (100, 10))})) == 1
    assert len(held({"w": Fragment(values[:775], (100, 10), (0, 0), (100, 10), 13)})) == 3
    assert len(held({"w": Fragment(values[:7], (100, 10), (0, 0), (100, 10), 1)})) == 1
