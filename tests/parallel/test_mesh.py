"""Layouts: one free axis is filled in, impossible products are refused with a legal one."""

import pytest

from headway.parallel.engines.capabilities import check
from headway.parallel.mesh import Layout, lay_out, rows_per_micro_batch
from headway.pretrain.config import Job, Parallel, Train
from headway.pretrain.errors import JobError


@pytest.mark.parametrize(
    ("axes", "world", "layout"),
    [
        ({}, 1, Layout()),
        ({}, 6, Layout(shard=6)),
        ({"replicate": 2}, 6, Layout(replicate=2, shard=3)),
        ({"replicate": -1, "shard": 1}, 4, Layout(replicate=4)),
        ({"replicate": 2, "shard": 2}, 4, Layout(replicate=2, shard=2)),
    ],
)
def test_free_axis_takes_what_is_left(axes, world, layout):
    assert lay_out(Parallel(**axes), world) == layout


@pytest.mark.parametrize(
    ("axes", "world", "message"),
    [
        ({"replicate": 4}, 6, "must divide the 6 ranks.*parallel.replicate=2, parallel.shard=3"),
        ({"replicate": 2, "shard": 2}, 6, "must be the 6 ranks.*parallel.shard=6|parallel.replicate"),
        ({"replicate": -1}, 2, "only one axis may be -1"),
        ({"shard": 0}, 2, "at least one rank"),
    ],
)
def test_impossible_layouts_are_refused(axes, world, message):
    with pytest.raises(JobError, match=message):
        lay_out(Parallel(**axes), world)


def test_the_engine_refuses_what_it_cannot_do():
    with pytest.raises(
        JobError, match=r"parallel\.tensor = 2: the native engine spreads along .*replicate, shard only"
    ):
        check(Job(parallel=Parallel(tensor=2)), Layout(tensor=2), "cpu")
    with pytest.raises(JobError, match=r"parallel\.context = 4"):
        check(Job(parallel=Parallel(context=-1, shard=1)), Layout(context=4), "cpu")


def test_global_batch_must_split():
    job = Job(train=Train(global_batch=10), parallel=Parallel(micro_batch=2))
    assert rows_per_micro_batch(job, 1) == 2
    with pytest.raises(JobError, match=r"train\.global_batch = 10: .* 4 ranks.*choice: 12"):
        rows_per_micro_batch(job, 4)
    with pytest.raises(JobError, match=r"parallel\.micro_batch = 2: must divide the 5 rows.*choice: 1"):
        rows_per_micro_batch(job, 2)
