"""What engines can do is a table: whole, with reasons, and what it refuses is refused with who can."""

import pytest

from headway.parallel.engines.build import check_installed
from headway.parallel.engines.capabilities import ENGINES, check, features_of
from headway.parallel.engines.features import FEATURES
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError


def job(**parallel):
    more = {key: parallel.pop(key) for key in ("optimizer", "precision", "model", "train") if key in parallel}
    return Job.model_validate({"data": {"tokenizer": {"kind": "bytes"}}, "parallel": parallel} | more)


def test_every_engine_says_something_of_every_feature():
    for engine, can in ENGINES.items():
        assert can.keys() == FEATURES.keys(), engine
        for feature, cell in can.items():
            assert cell.why or cell.status == "tested", f"{engine}: why is {feature} {cell.status}?"


def test_what_a_job_asks_for_is_seen():
    asked = features_of(
        job(tensor=2, pipeline=2, optimizer={"ema": 0.9}, precision="bf16"),
        Layout(tensor=2, pipeline=2),
        "cpu",
    )
    assert {"tensor", "sequence", "pipeline", "schedule 1f1b", "bf16", "adamw", "ema"} == asked.keys()
    assert not features_of(job(), Layout(), "cpu").keys() - {"adamw"}


@pytest.mark.parametrize(
    ("settings", "layout", "field", "said"),
    [
        (
            {"engine": "megatron", "optimizer": {"name": "muon"}},
            Layout(shard=2),
            "optimizer.name",
            "parallel.engine = native",
        ),
        ({"engine": "deepspeed", "precision": "fp64"}, Layout(), "precision", "parallel.engine = native"),
        (
            {"engine": "megatron", "pipeline": 2, "schedule": "zbv"},
            Layout(pipeline=2),
            "parallel.schedule",
            "parallel.engine = native, or parallel.engine = deepspeed, or parallel.schedule = 1f1b",
        ),
    ],
)
def test_what_an_engine_cannot_do_is_refused_with_who_can(settings, layout, field, said):
    with pytest.raises(JobError) as refusal:
        check(job(**settings), layout, "cpu")
    assert refusal.value.field == field
    assert settings["engine"] in refusal.value.rule
    assert said in str(refusal.value)


def test_no_engine_is_named_that_refuses_something_else_of_the_job():
    with pytest.raises(JobError) as refusal:
        check(job(engine="megatron", precision="fp64", schedule="zbv"), Layout(pipeline=2), "cpu")
    assert "deepspeed" not in str(refusal.value)


def test_sections_of_other_engines_are_not_read():
    settings = job(engine="native", deepspeed={"zero": 2, "offload_optimizer": "cpu"})
    check(settings, Layout(), "cpu")


@pytest.mark.parametrize(("engine", "module"), [("deepspeed", "deepspeed"), ("megatron", "megatron")])
def test_a_missing_package_is_named_with_its_extra(monkeypatch, engine, module):
    monkeypatch.setattr("headway.parallel.engines.build.find_spec", lambda name: None)
    with pytest.raises(JobError, match=rf"pip install 'headway\[{engine}\]'"):
        check_installed(engine)
    check_installed("native")


@pytest.mark.parametrize(
    ("said", "layout", "field", "rule"),
    [
        ({"distributed_optimizer": False}, Layout(shard=2), "distributed_optimizer", "parallel.shard = 2"),
        ({"overlap_param_gather": True}, Layout(replicate=2), "overlap_param_gather", "overlap_grad_reduce"),
        (
            {"overlap_param_gather": True, "overlap_grad_reduce": True, "distributed_optimizer": False},
            Layout(replicate=2),
            "overlap_param_gather",
            "nothing to gather",
        ),
    ],
)
def test_what_is_said_to_megatron_agrees_with_itself(said, layout, field, rule):
    with pytest.raises(JobError, match=rule) as refusal:
        check(job(engine="megatron", megatron=said), layout, "cpu")
    assert refusal.value.field == f"parallel.megatron.{field}"
    check(job(megatron=said), layout, "cpu")  # another engine does not read it
