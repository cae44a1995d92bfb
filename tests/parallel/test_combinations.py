"""Axes together: pairs and threes of them, for every family, against one process in fp64, all that is random on."""

import pytest

from headway.tests.parallel.test_families import compare, curves

EVEN = {"heads": 4}
FAMILIES = ["experts", "bert", "t5", "vit"]


def even_curves(rank, world, parallel, names):
    return curves(rank, world, parallel, names, EVEN)


@pytest.fixture(scope="module")
def alone():
    """The curve of one process, by name."""
    known = {}

    def get(name):
        if name not in known:
            known.update(curves(0, 1, {}, [name], EVEN))
        return known[name]

    return get


ONE = {"shard": 1}
PAIRS = {
    "tensor x pipeline": ONE | {"tensor": 2, "pipeline": 2, "micro_batch": 3},
    "tensor x context": ONE | {"tensor": 2, "context": 2},
    "tensor x ulysses": ONE | {"tensor": 2, "context": 2, "context_method": "ulysses"},
    "tensor x shard": {"tensor": 2, "shard": 2},
    "tensor x replicate": ONE | {"tensor": 2, "replicate": 2},
    "pipeline x context": ONE | {"pipeline": 2, "context": 2, "micro_batch": 3},
    "pipeline x ulysses": ONE | {"pipeline": 2, "context": 2, "context_method": "ulysses", "micro_batch": 3},
    "context x shard": {"context": 2, "shard": 2},
    "context x replicate": ONE | {"context": 2, "replicate": 2},
    "pipeline x shard": {"pipeline": 2, "shard": 2, "micro_batch": 3},
    "pipeline x replicate": ONE | {"pipeline": 2, "replicate": 2, "micro_batch": 3},
    "shard x replicate": {"shard": 2, "replicate": 2},
}
EXPERTS = {
    "expert x tensor": ONE | {"expert": 2, "tensor": 2},
    "expert x context": ONE | {"expert": 2, "context": 2},
    "expert x shard": {"expert": 2, "shard": 2},
    "expert x tensor x shard": {"expert": 4, "tensor": 2, "shard": 2},
    "expert x pipeline x shard": {"expert": 2, "pipeline": 2, "shard": 2, "micro_batch": 3},
}
THREES = {
    "tensor x pipeline x shard": {"tensor": 2, "pipeline": 2, "shard": 2, "micro_batch": 3},
    "tensor x context x shard": {"tensor": 2, "context": 2, "shard": 2},
    "tensor x context x replicate": ONE | {"tensor": 2, "context": 2, "replicate": 2},
    "tensor x shard x replicate": {"tensor": 2, "shard": 2, "replicate": 2},
    "context x shard x replicate": {"context": 2, "shard": 2, "replicate": 2},
    "pipeline x shard x replicate": {"pipeline": 2, "shard": 2, "replicate": 2, "micro_batch": 1},
}
ALWAYS = [("tensor x pipeline", "experts"), ("tensor x context", "t5")]
"""What `make test` runs."""


def check(pool, alone, parallel, name):
    ranks = 1
    for axis in ("pipeline", "replicate", "shard", "context", "tensor"):
        ranks *= parallel.get(axis, 1)
    for found in pool(even_curves, ranks=ranks, parallel=parallel, names=[name]):
        expected = alone(name)
        held = (
            expected[3] if parallel.get("pipeline", 1) == 1 else {k: expected[3][k] for k in found[name][3]}
        )
        compare(name, found[name], (*expected[:3], held))


@pytest.mark.parametrize(("axes", "name"), ALWAYS)
def test_axes_together_draw_the_curve_of_one_process(pool, alone, axes, name):
    check(pool, alone, PAIRS[axes], name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("axes", [*PAIRS, *THREES])
def test_every_pair_and_three_of_axes(pool, alone, axes, name):
    if (axes, name) in ALWAYS:
        pytest.skip("run by the test above")
    check(pool, alone, (PAIRS | THREES)[axes], name)


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["experts", "roberta"])
@pytest.mark.parametrize("axes", EXPERTS)
def test_experts_beside_other_axes(pool, alone, axes, name):
    check(pool, alone, EXPERTS[axes], name)
