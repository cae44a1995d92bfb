"""Coverage of tensors by boxes, against counting every element."""

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.parallel.checkpoint.boxes import Box, flaw

boxes = st.lists(
    st.builds(
        lambda a, b, c, d: Box((a, b), (c, d)),
        *[st.integers(0, 3)] * 2,
        *[st.integers(1, 4)] * 2,
    ),
    max_size=6,
)


def grid(shape, cuts):
    """The boxes of a grid that cuts dim d at `cuts[d]`."""
    edges = [[0, *sorted(c), n] for c, n in zip(cuts, shape, strict=True)]
    rows = [list(itertools.pairwise(e)) for e in edges]
    return [Box((a, c), (b - a, d - c)) for a, b in rows[0] for c, d in rows[1] if b > a and d > c]


@given(boxes)
@settings(max_examples=300, deadline=None)
def test_flaw_agrees_with_counting(parts):
    shape = (4, 4)
    inside = all(s <= 4 for part in parts for s in part.stop)
    count = np.zeros((8, 8), dtype=int)
    for part in parts:
        count[part.within(Box.whole(shape))] += 1
    exact = inside and (count[:4, :4] == 1).all()
    assert (flaw(parts, shape) is None) == exact


@given(st.lists(st.integers(0, 6), max_size=4), st.lists(st.integers(0, 5), max_size=4), st.randoms())
@settings(max_examples=100, deadline=None)
def test_grids_are_exact_and_any_loss_or_double_is_seen(rows, columns, random):
    parts = grid((6, 5), (rows, columns))
    random.shuffle(parts)
    assert flaw(parts, (6, 5)) is None
    assert flaw(parts[1:], (6, 5)) is not None
    assert flaw([*parts, parts[0]], (6, 5)) is not None


def test_scalars_and_empty_tensors():
    assert flaw([Box((), ())], ()) is None
    assert flaw([], ()) is not None
    assert flaw([Box((), ())] * 2, ()) is not None
    assert flaw([], (0, 3)) is None
    assert flaw([Box((0,), (5,))], (4,)) is not None
    assert flaw([Box((0,), (4,))], (4, 1)) is not None


def test_overlap_and_within_against_numpy():
    whole = np.arange(48).reshape(6, 8)
    a, b = Box((1, 2), (4, 5)), Box((3, 0), (3, 4))
    common = a.overlap(b)
    assert common == Box((3, 2), (2, 2))
    every = Box.whole(whole.shape)
    for box in (a, b):
        assert (whole[box.within(every)][common.within(box)] == whole[3:5, 2:4]).all()
    assert a.overlap(Box((5, 0), (1, 8))) is None
