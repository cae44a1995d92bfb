"""Which layer of the teacher each layer of the student learns from."""

import pytest

from headway.pretrain.errors import JobError
from headway.pretrain.objectives.distill.layers import layer_map


@pytest.mark.parametrize(("how", "students", "teachers", "expected"), [
    ("uniform", 4, 12, [2, 5, 8, 11]),  # TinyBERT's g(m) = 3 m, of layers that are counted from 1
    ("uniform", 6, 12, [1, 3, 5, 7, 9, 11]),  # DistilBERT's second layers, up to the last
    ("uniform", 3, 3, [0, 1, 2]),
    ("uniform", 1, 5, [4]),
    ("top", 4, 12, [8, 9, 10, 11]),
    ("bottom", 4, 12, [0, 1, 2, 3]),
    ("last", 4, 12, [None, None, None, 11]),
    ("last", 6, 3, [None] * 5 + [2]),
    ([None, 7, 7], 3, 12, [None, 7, 7]),
])  # fmt: skip
def test_maps_of_layers(how, students, teachers, expected):
    assert layer_map(how, students, teachers, "field") == expected


@pytest.mark.parametrize(("how", "students", "teachers", "said"), [
    ("uniform", 5, 12, r"field = 'uniform': 5 layers cannot be spread evenly over the teacher's 12.*1, 3, 6, 8, 11\]"),
    ("uniform", 6, 3, r"field = 'uniform': 6 layers of the student cannot each have one of the teacher's 3.*last"),
    ("top", 4, 3, r"field = 'top': 4 layers.*last"),
    ("bottom", 4, 3, r"field = 'bottom': 4 layers.*last"),
    ([0, 1], 3, 6, r"field = \[0, 1\]: names a layer.*each of the student's 3 layers.*\[None, None, 5\]"),
    ([0, 6], 2, 6, r"field = \[0, 6\]: the teacher has layers 0 to 5, and none 6.*\[0, 5\]"),
    ([9, 8, 7, 6], 4, 2, r"the teacher has layers 0 to 1, and none 9.*\[1, 1, 1, 1\]"),
])  # fmt: skip
def test_maps_that_do_not_fit_are_refused(how, students, teachers, said):
    with pytest.raises(JobError, match=said):
        layer_map(how, students, teachers, "field")
