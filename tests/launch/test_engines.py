"""A run changes its engine by one word, and its curve goes on; what an engine cannot do is refused before it starts."""

import subprocess

import numpy as np
import pytest

from headway.parallel.checkpoint.manifest import read_manifest
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.test_train import HEADWAY

CONSTANT = ("schedule.name=constant", "schedule.warmup=1", "precision=fp32", "optimizer.eps=1e-6")
"""The same rate at every step, whatever the length of the run."""


def train(recipe, folder, *sets, nproc=1, code=0):
    command = [*HEADWAY, "train", str(recipe), "--nproc", str(nproc)]
    for one in (f"run.dir={folder}", *CONSTANT, *sets):
        command += ["--set", one]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(folder):
    return [row["loss"] for row in read_metrics(folder)]


@pytest.mark.matrix
def test_a_run_changes_its_engine_by_one_word(small_job, tmp_path):
    train(small_job, tmp_path, "run.name=straight", "train.steps=9")
    train(small_job, tmp_path, "run.name=changing", "train.steps=3")
    train(small_job, tmp_path, "run.name=changing", "train.steps=6", "parallel.engine=deepspeed", nproc=2)
    train(
        small_job,
        tmp_path,
        "run.name=changing",
        "train.steps=9",
        "parallel.engine=megatron",
        "parallel.tensor=2",
        nproc=2,
    )
    straight, changing = tmp_path / "straight", tmp_path / "changing"
    np.testing.assert_allclose(losses(changing), losses(straight), rtol=1e-5)
    ours, theirs = (
        read_manifest(folder / "checkpoints/step_00000009").tensors for folder in (changing, straight)
    )
    assert {n: (e.dtype, e.shape) for n, e in ours.items()} == {
        n: (e.dtype, e.shape) for n, e in theirs.items()
    }
    assert (changing / "report.html").stat().st_size > 10_000


def test_what_an_engine_cannot_do_is_refused_before_a_process_starts(small_job, tmp_path):
    said = train(
        small_job,
        tmp_path,
        "parallel.engine=megatron",
        "optimizer.name=lamb",
        "run.name=refused",
        nproc=2,
        code=2,
    )
    assert "parallel.engine = native" in said
    assert "Traceback" not in said
    assert not (tmp_path / "refused").exists()
