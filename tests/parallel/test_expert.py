"""Experts spread over ranks draw the curves of one process."""

import pytest

from headway.tests.parallel.test_families import compare, curves

MOE = ["experts", "dropless", "transformer", "roberta", "spectral"]


@pytest.fixture(scope="module")
def alone():
    return curves(0, 1, {}, MOE)


LAYOUTS = [
    (2, {"expert": 2, "shard": 2}, ["experts", "roberta"]),
    (4, {"expert": 2, "shard": 4, "micro_batch": 1}, ["experts"]),
    (4, {"expert": 4, "shard": 4}, ["experts", "roberta"]),
    (4, {"expert": 2, "replicate": 2, "shard": 2, "micro_batch": 1}, ["experts", "roberta"]),
    (3, {"expert": 3, "shard": 3, "micro_batch": 2}, ["transformer", "spectral"]),
    (2, {"expert": 2, "shard": 1, "tensor": 2}, ["experts", "roberta"]),
    (4, {"expert": 2, "shard": 1, "tensor": 4}, ["experts", "roberta"]),
    (4, {"expert": 4, "shard": 2, "tensor": 2}, ["experts", "roberta"]),
]


@pytest.mark.parametrize(("ranks", "parallel", "names"), LAYOUTS)
def test_every_layout_draws_the_curves_of_one_process(pool, alone, ranks, parallel, names):
    for found in pool(curves, ranks=ranks, parallel=parallel, names=names):
        for name in names:
            compare(name, found[name], alone[name])
