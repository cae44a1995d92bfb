"""One curve along pipelines: every family and schedule against one process, in fp64, all that is random on."""

from functools import cache

import pytest

from headway.tests.parallel.family_cases import CASES
from headway.tests.parallel.test_families import compare, curves
from headway.tests.parallel.test_native import curve


@cache
def family(name):
    """The curves of one process."""
    return curves(0, 1, {}, [name])[name]


@cache
def plain(optimizer):
    return curve(0, 1, {}, optimizer=optimizer)


def compare_parts(name, found, expected):
    """Each rank holds a part of the state; copies are equal, and together they are the whole."""
    assert set().union(*(rank[-1] for rank in found)) == expected[-1].keys()
    for rank in found:
        whole = {key: rank[-1].get(key, value) for key, value in expected[-1].items()}
        compare(name, (*rank[:-1], whole), expected)
    for key in expected[-1]:
        copies = [rank[-1][key].tobytes() for rank in found if key in rank[-1]]
        assert len(set(copies)) == 1, key


@pytest.mark.parametrize("name", list(CASES))
def test_every_family_draws_the_curve_of_one_process(pool, name):
    found = pool(curves, ranks=2, parallel={"pipeline": 2}, names=[name])
    compare_parts(name, [rank[name] for rank in found], family(name))


SCHEDULES = [
    (2, {"pipeline": 2, "schedule": "gpipe"}, "adamw"),
    (2, {"pipeline": 2, "schedule": "1f1b", "micro_batch": 3}, "muon"),
    (4, {"pipeline": 2, "shard": 2}, "adamw"),
    (4, {"pipeline": 2, "shard": 2}, "muon"),
    (4, {"pipeline": 2, "replicate": 2, "shard": 1}, "adamw"),
]


@pytest.mark.parametrize(("ranks", "parallel", "optimizer"), SCHEDULES)
def test_layouts(pool, ranks, parallel, optimizer):
    found = pool(curve, ranks=ranks, parallel=parallel, optimizer=optimizer)
    losses, norms, state = plain(optimizer)
    compare_parts("gpt", [(a, b, [], c) for a, b, c in found], (losses, norms, [], state))


DEEP = {
    "interleaved_1f1b": {},
    "interleaved_zero_bubble": {},
    "zbv": {},
    "dualpipev": {},
}


@pytest.mark.parametrize("schedule", DEEP)
def test_schedules(pool, schedule):
    """`experts` has four uses of two blocks, tied to the head."""
    parallel = {"pipeline": 2, "schedule": schedule}
    found = pool(curves, ranks=2, parallel=parallel, names=["experts"])
    compare_parts("experts", [rank["experts"] for rank in found], family("experts"))
