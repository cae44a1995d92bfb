"""`headway config`."""

import json
from pathlib import Path

import pytest

from headway.launch.settings import schema, show, show_engine
from headway.pretrain.errors import JobError


def test_the_shipped_schema_is_the_jobs(capsys):
    shipped = Path(__file__).parents[2] / "configs/schema.json"
    assert json.loads(shipped.read_text()) == schema(), "headway config schema > configs/schema.json"


def test_show_names_origins_and_settings_without_effect(capsys):
    show(["gpt/tiny"], ["schedule.name=constant", "schedule.decay=0.3"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "command line" in lines["schedule.decay"]
    assert "no effect: only wsd" in lines["schedule.decay"]
    assert "gpt/tiny" in lines["model.layers"]
    assert "default" in lines["optimizer.eps"]


def test_what_a_job_becomes_in_deepspeeds_words(capsys):
    show_engine("deepspeed", ["gpt/124m"], ["parallel.deepspeed.offload_optimizer=cpu", "precision=bf16"], 8)
    told = json.loads(capsys.readouterr().out)
    assert told["zero_optimization"] == {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    assert told["train_batch_size"] == 512
    assert told["bf16"] == {"enabled": True}
    with pytest.raises(JobError, match=r"parallel\.engine = native"):
        show_engine("deepspeed", ["gpt/124m"], ["precision=fp64"], 8)
    with pytest.raises(JobError, match="deepspeed"):
        show_engine("megatron", ["gpt/124m"], [], 8)
