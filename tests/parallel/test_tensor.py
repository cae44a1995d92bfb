"""Tensor parallelism: every family at several layouts against one process, in fp64, all that is random on."""

import pytest

from headway.tests.parallel.family_cases import UNCUT
from headway.tests.parallel.proof import prove

EVEN = {"model": {"heads": 4}}
"""The cases have 3 heads, which two ranks do not divide."""
FAMILIES = sorted(UNCUT)
LAYOUTS = [
    (
        {"tensor": 2, "micro_batch": 4},
        ["bert", "experts", "vit", "content", "composed", "linear", "mobile"],
    ),
    pytest.param({"tensor": 2, "shard": 2}, ["spectral", "ul2"], marks=pytest.mark.matrix),
    ({"tensor": 2, "sequence": False}, ["albert", "mae", "deit", "inverted"]),
]
MATRIX = [
    *(({"tensor": 2, "micro_batch": 4}, [name]) for name in FAMILIES),
    *(({"tensor": 2, "shard": 2}, FAMILIES[i : i + 3]) for i in range(0, len(FAMILIES), 3)),
    ({"tensor": 2, "sequence": False}, ["bert", "experts", "vit"]),
    ({"tensor": 2, "sequence": False, "shard": 2}, ["spectral", "ul2"]),
    ({"tensor": 2, "replicate": 2, "shard": 1}, ["bert", "experts"]),
    ({"tensor": 4}, ["bert", "ul2", "experts", "vit"]),
    ({"tensor": 2, "shard": 2, "replicate": 2}, ["t5", "experts"]),
]


@pytest.mark.parametrize(
    ("parallel", "names"), [*LAYOUTS, *(pytest.param(*layout, marks=pytest.mark.long) for layout in MATRIX)]
)
def test_every_family_draws_the_curve_of_one_process(pool, parallel, names):
    prove(pool, names, parallel, EVEN)
