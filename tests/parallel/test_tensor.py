"""Tensor parallelism: every family at several layouts against one process, in fp64, all that is random on."""

import pytest

from headway.tests.parallel.family_cases import CASES
from headway.tests.parallel.test_families import compare, curves

EVEN = {"heads": 4}
"""The cases have 3 heads, which two ranks do not divide."""


def cut_curves(rank, world, parallel, names):
    return curves(rank, world, parallel, names, EVEN)


@pytest.fixture(scope="module")
def alone():
    """The curves of one process."""
    return curves(0, 1, {}, list(CASES), EVEN)


FAMILIES = sorted(CASES)
LAYOUTS = [
    (2, {"tensor": 2, "micro_batch": 4}, ["bert", "experts", "vit"]),
    (4, {"tensor": 2, "shard": 2}, ["spectral", "ul2"]),
    (2, {"tensor": 2, "sequence": False}, ["albert", "mae"]),
]
MATRIX = [
    *((2, {"tensor": 2, "micro_batch": 4}, [name]) for name in FAMILIES),
    *((4, {"tensor": 2, "shard": 2}, FAMILIES[i : i + 3]) for i in range(0, len(FAMILIES), 3)),
    (2, {"tensor": 2, "sequence": False}, ["bert", "experts", "vit"]),
    (4, {"tensor": 2, "sequence": False, "shard": 2}, ["spectral", "ul2"]),
    (4, {"tensor": 2, "replicate": 2, "shard": 1}, ["bert", "experts"]),
    (4, {"tensor": 4}, ["bert", "ul2", "experts", "vit"]),
    (8, {"tensor": 2, "shard": 2, "replicate": 2}, ["t5", "experts"]),
]


@pytest.mark.parametrize(
    ("ranks", "parallel", "names"),
    [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.matrix) for layout in MATRIX)],
)
def test_every_family_draws_the_curve_of_one_process(pool, alone, ranks, parallel, names):
    for found in pool(cut_curves, ranks=ranks, parallel=parallel, names=names):
        for name in names:
            compare(name, found[name], alone[name])
