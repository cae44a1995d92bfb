"""`headway config show --engine deepspeed` prints the JSON, and refuses what the engine cannot do."""

import json

import pytest

from headway.launch import deepspeed_json
from headway.pretrain.errors import JobError


def test_the_json_is_printed(capsys):
    sets = ["optimizer.name=adamw", "precision=bf16", "parallel.micro_batch=4", "train.global_batch=16"]
    deepspeed_json.show(["gpt/tiny"], sets, 2)
    found = json.loads(capsys.readouterr().out)
    assert found["zero_optimization"]["stage"] == 3
    assert found["gradient_accumulation_steps"] == 2
    assert found["bf16"]["enabled"]


def test_a_job_that_it_cannot_run_has_none():
    with pytest.raises(JobError, match=r"optimizer\.name"):
        deepspeed_json.show(["gpt/tiny"], ["optimizer.name=muon"], 2)
