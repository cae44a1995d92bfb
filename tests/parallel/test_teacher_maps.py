"""A teacher's attention maps, for reports, at every layout: those of one process, whole on every rank."""

import numpy as np
import pytest

from headway.tests.chosen import first
from headway.tests.parallel.proof import ROWS, Running, ranks_of

NAMES = ["learning_gpt", "learning_bert", "learning_vit"]
LAYOUTS = [
    {"shard": 2},
    {"tensor": 2},
    {"context": 2},
    {"pipeline": 2, "micro_batch": 4},
    {"replicate": 2, "teacher": {"shard": 2}},
    {"shard": 2, "teacher": {"tensor": 2}},
]


def maps_of(rank, world, parallel, names):
    """Maps of teacher and student on two rows that every rank has, after a step."""
    found = {}
    for name in names:
        running = Running(name, rank, world, parallel)
        batch = running.objective.collate(running.stream.batch(0, ROWS, 0, 1))
        running.step(0)
        some = {key: value[:2] for key, value in batch.items()}
        student = running.engine.whole().attention_maps(some)
        found[name] = [x.numpy() for x in (running.engine.teacher.attention_maps(some), student)]
    return found


@pytest.mark.parametrize("parallel", first(3, LAYOUTS), ids=str)
def test_maps_are_those_of_one_process(pool, parallel):
    expected = maps_of(0, 1, {}, NAMES)
    for found in pool(maps_of, ranks=ranks_of(parallel), parallel=parallel, names=NAMES):
        for name in NAMES:
            for ours, theirs in zip(found[name], expected[name], strict=True):
                # fp64; the student has made a step, whose sums are in another order.
                np.testing.assert_allclose(ours, theirs, rtol=1e-8, atol=1e-11, err_msg=name)
