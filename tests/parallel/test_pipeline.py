"""One curve along pipelines: every family and schedule against one process, in fp64, all that is random on."""

import numpy as np
import pytest

from headway.parallel.engines.capabilities import check
from headway.parallel.mesh import Layout
from headway.parallel.pipeline.plan import place_stages, split_evenly, stages_of
from headway.parallel.pipeline.rules import micro_rows
from headway.pretrain.errors import JobError
from headway.tests.parallel.family_cases import UNCUT, job_of
from headway.tests.parallel.proof import prove
from headway.tests.parallel.test_families import evaluates_alike, resumed, saved


@pytest.mark.parametrize(
    "name",
    [n if n in ("t5", "vit", "deit", "mobile") else pytest.param(n, marks=pytest.mark.long) for n in UNCUT],
)
def test_every_family_draws_the_curve_of_one_process(pool, name):
    """Among them three blocks on two stages (vit), a tied table (t5, bert), one that is a part of the head's weight
    (mobile), experts with balancing biases."""
    prove(pool, [name], {"pipeline": 2})


LAYOUTS = [
    ({"pipeline": 2, "schedule": "gpipe", "micro_batch": 4}, ["experts"]),
    ({"pipeline": 2, "schedule": "interleaved_1f1b"}, ["experts", "t5"]),
    ({"pipeline": 2, "schedule": "interleaved_zero_bubble"}, ["experts", "transformer"]),
    ({"pipeline": 2, "schedule": "zbv"}, ["experts", "t5", "albert"]),
    ({"pipeline": 2, "schedule": "dualpipev"}, ["experts", "transformer"]),
    ({"pipeline": 4}, ["albert", "t5"]),
    ({"pipeline": 2, "shard": 2}, ["bert", "t5"]),
    ({"pipeline": 2, "shard": 2, "schedule": "zbv"}, ["experts", "t5"]),
    ({"pipeline": 2, "replicate": 2, "shard": 1, "micro_batch": 3}, ["experts", "t5"]),
    ({"pipeline": 2, "context": 2, "schedule": "zbv"}, ["experts", "t5"]),
]


@pytest.mark.parametrize(
    ("parallel", "names"),
    [
        LAYOUTS[3],
        *(pytest.param(*case, marks=pytest.mark.long) for i, case in enumerate(LAYOUTS) if i != 3),
    ],
)
def test_schedules_and_layouts_draw_the_curve_of_one_process(pool, parallel, names):
    """`experts` and `albert` use a block twice: over four stages both uses are on ranks of their own."""
    prove(pool, names, parallel)


@pytest.mark.long
def test_a_checkpoint_of_a_pipeline_resumes_elsewhere_and_back(pool, tmp_path):
    """Stages merge by name: two ranks of a pipeline, one process, two shards, and back."""
    for name in ("spectral", "t5"):
        settings = {"folder": str(tmp_path / name), "name": name}
        found = pool(saved, ranks=2, parallel={"pipeline": 2}, **settings)
        kept, after = ({k: v for rank in found for k, v in rank[i].items()} for i in (0, 2))
        for ranks, parallel in ((2, {"pipeline": 2}), (1, {}), (2, {"shard": 2})):
            again = pool(resumed, ranks=ranks, parallel=parallel, **settings)
            for loaded, losses, ended in again:
                assert losses == pytest.approx(found[0][1], rel=1e-9)
                for key, value in loaded.items():
                    assert value.tobytes() == kept[key].tobytes(), key
                for key, value in ended.items():
                    np.testing.assert_allclose(value, after[key], rtol=1e-8, atol=1e-10, err_msg=key)
    settings = {"folder": str(tmp_path / "back"), "name": "t5"}
    kept, losses, _ = pool(saved, ranks=2, parallel={"shard": 2}, **settings)[0]
    for loaded, again, _ in pool(resumed, ranks=2, parallel={"pipeline": 2, "schedule": "zbv"}, **settings):
        assert again == pytest.approx(losses, rel=1e-9)
        for key, value in loaded.items():
            assert value.tobytes() == kept[key].tobytes(), key


@pytest.mark.parametrize(
    "names",
    [["albert"], pytest.param(["vit", "mae", "dropless", "experts", "spectral"], marks=pytest.mark.long)],
)
def test_evaluation_is_the_same(pool, names):
    evaluates_alike(pool, {"pipeline": 2}, names)


def test_stages_cost_nearly_the_same():
    assert split_evenly([1, 1, 1], 2) in ([1, 2], [2, 1])
    assert split_evenly([1, 1, 1, 3], 2) == [3, 1]  # a head of three blocks' cost
    assert split_evenly([5, 1, 1, 1, 1, 1], 3) in ([1, 2, 3], [1, 3, 2])
    stages = stages_of([2, 2, 1], [3, 2])
    assert [s.spans for s in stages] == [{0: (0, 2)}, {0: (2, 3), 1: (0, 1)}, {1: (1, 2)}]
    assert [s.last for s in stages] == [False, False, True]
    assert place_stages(6, 3, v_shaped=True) == [0, 1, 2, 2, 1, 0]
    assert place_stages(6, 3, v_shaped=False) == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("layout", "parallel", "more", "message"),
    [
        (4, {}, {}, r"parallel\.pipeline = 4: .* 4 stages, and only 2 blocks .* choice: 2"),
        (2, {"schedule": "zbv"}, {}, r"parallel\.pipeline = 2: with 2 stage.* only 2 blocks .* choice: 1"),
        (2, {"virtual": 2}, {}, r"parallel\.virtual = 2: .* 1f1b has exactly 1 .* choice: 1"),
        (2, {"schedule": "zbv", "virtual": 3}, {}, r"parallel\.virtual = 3: .* exactly 2 .* choice: 2"),
        (
            2,
            {"micro_batch": 12},
            {},
            r"parallel\.micro_batch = 12: gives 1 micro-batch.* at least 2.* choice: 6",
        ),
        (2, {"train": {"global_batch": 1}}, {}, r"train\.global_batch = 1: .* at least 2.* choice: 2"),
        (2, {}, {"init": {"lsuv": True}}, r"model\.init\.lsuv = True: .* choice: False"),
    ],
)
def test_what_a_pipeline_cannot_do_is_refused(layout, parallel, more, message):
    train = parallel.pop("train", {}) if "train" in parallel else {}
    job = job_of("bert", {"pipeline": layout, **parallel}, 4, 12)
    job = job.model_copy(
        update={
            "model": type(job.model).model_validate(job.model.model_dump() | more),
            "train": job.train.model_copy(update=train),
        }
    )
    with pytest.raises(JobError, match=message):
        check(job, Layout(pipeline=layout), "cpu")


def test_an_older_torch_does_not_split_the_backward(monkeypatch):
    monkeypatch.delattr("torch.distributed.pipelining._backward._autograd_grad_for_inputs")
    job = job_of("albert", {"pipeline": 2, "schedule": "zbv"}, 4, 12)
    with pytest.raises(JobError, match=r"parallel\.schedule = 'zbv': .* torch 2\.13 can.*interleaved_1f1b"):
        check(job, Layout(pipeline=2), "cpu")


def test_micro_batches_without_a_number_leave_four_a_rank():
    rows = lambda **parallel: micro_rows(job_of("experts", parallel, 4, 24), Layout(pipeline=2))  # noqa: E731
    assert rows() == 3
    assert rows(schedule="dualpipev") == 3
    assert rows(schedule="interleaved_1f1b") == 3
    assert (
        micro_rows(job_of("dropless", {}, 4, 12), Layout(pipeline=2)) == 1
    )  # the ramp begins with four rows
