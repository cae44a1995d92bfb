"""The command line: light, complete, and plain about what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from headway.launch import run
from headway.launch.cli import app, explain
from headway.pretrain.errors import CheckpointError, Interrupted, JobError

COMMANDS = [
    ["train"],
    ["eval"],
    ["look"],
    ["watch"],
    ["data", "build"],
    ["data", "inspect"],
    ["data", "ledger"],
    ["tokenizer", "train"],
    ["tokenizer", "encode"],
    ["checkpoint", "ls"],
    ["checkpoint", "verify"],
    ["config", "show"],
    ["config", "schema"],
    ["attention", "ls"],
    ["kernels", "tune"],
    ["kernels", "show"],
]


def call(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_the_command_line_loads_nothing_heavy():
    program = (
        "import sys, headway.launch.cli;"
        "print([m for m in ('torch', 'numpy', 'pydantic', 'wandb', 'yaml', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_errors_name_the_rank_and_all_stop_with_one_word(monkeypatch, capsys):
    assert explain(JobError("a.b", 1, "must be 2")) == 2
    assert capsys.readouterr().err == "headway: a.b = 1: must be 2.\n"
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert explain(CheckpointError("a shard is missing")) == 70
    assert capsys.readouterr().err == "headway (rank 1): a shard is missing\n"
    assert explain(Interrupted("saved")) == 75
    assert capsys.readouterr().err == ""
    assert explain(ValueError("what\nelse")) == 70
    said = capsys.readouterr().err
    assert "unexpected ValueError: what (traceback: " in said
    Path(said.split("traceback: ")[1].rstrip(")\n")).unlink()


def test_data_and_tokenizer_commands(corpus, tmp_path):
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{sources: ['{corpus}'], tokenizer: {{kind: bytes}}, heldout: 0.2}}\n")
    built = call("data", "build", recipe)
    assert built.exit_code == 0, built.output
    prefix = built.stdout.splitlines()[0].split()[-1]
    assert "161 documents" in built.output
    assert "separator" in call("data", "inspect", prefix).output
    model = tmp_path / "my.model"
    assert call("tokenizer", "train", model, corpus, "--vocab", 300).exit_code == 0
    assert "tokens" in call("tokenizer", "encode", model, "the cat sat").output


def test_malformed_lines_stop_or_are_skipped_and_counted(tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "a good line"}\n{"text": 3}\n{"text": "another one"}\n' * 3)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"data: {{sources: ['{data}'], tokenizer: {{kind: bytes}}, heldout: 0.0}}\n")
    stopped = call("data", "build", recipe)
    assert stopped.exception is not None
    assert f"{data}:2" in str(stopped.exception)
    skipped = call("data", "build", recipe, "--on-error", "skip")
    assert skipped.exit_code == 0
    assert "left out 3 malformed lines" in skipped.output


def test_checkpoint_commands_name_what_is_broken(small_job, tmp_path):
    sets = [f"run.dir={tmp_path}", "run.name=run", "train.steps=10"]
    run.train([str(small_job)], sets)
    folder = tmp_path / "run"
    listed = call("checkpoint", "ls", folder).output
    assert "step_00000005" in listed
    assert "LATEST" in next(line for line in listed.splitlines() if "step_00000010" in line)
    assert call("checkpoint", "verify", folder).exit_code == 0
    shard = next((folder / "checkpoints/step_00000010").glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    broken = call("checkpoint", "verify", folder)
    assert shard.name in broken.output
    assert "step_00000005" in str(broken.exception)
    assert call("checkpoint", "ls", tmp_path / "nothing").exception.exit_code == 2


def test_gradient_histograms_and_curves_reach_wandb(small_job, tmp_path):
    sets = [f"run.dir={tmp_path}", "run.name=run", "train.steps=4", "checkpoint.every=0"]
    sets += ["tracking.wandb=offline", "tracking.histograms_every=2"]
    run.train([str(small_job)], sets)
    (file,) = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    content = file.read_bytes()
    assert b"gradients/model.blocks.0.attention.q.weight" in content
    assert json.loads((tmp_path / "run/wandb/run.json").read_text())["id"] in file.name


@pytest.mark.slow
def test_two_local_ranks_draw_the_curve_of_one(small_job, tmp_path):
    common = ["--set", f"run.dir={tmp_path}", "--set", "train.steps=4", "--set", "precision=fp64"]
    headway = [sys.executable, "-P", "-c", "from headway.launch.cli import main; main()"]
    for name, more in (("one", []), ("two", ["--nproc", "2"])):
        command = [*headway, "train", str(small_job), *common, "--set", f"run.name={name}", *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    # fp64, sums over ranks in another order
    assert two == pytest.approx(one, rel=1e-9)
