"""Whole runs that tell TensorBoard and Prometheus."""

import re
import signal
import subprocess
import sys
import urllib.request
from importlib.util import find_spec

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from headway.launch import run
from headway.parallel.checkpoint.retention import latest, step_of
from headway.pretrain.errors import JobError
from headway.pretrain.records.backends.tensorboard import tag_of
from headway.pretrain.records.metrics import read_metrics
from headway.tests.pretrain.records.backends.tracker_readers import read as read_tracker

HEADWAY = [sys.executable, "-P", "-c", "from headway.launch.cli import main; main()"]


@pytest.mark.slow
def test_a_run_is_scraped_stopped_and_goes_on(small_job, tmp_path):
    sets = [
        f"run.dir={tmp_path}", "run.name=run", "tracking.backends=[tensorboard,prometheus]",
        "tracking.prometheus.port=0", "tracking.histograms_every=5", "schedule.steps=100",
    ]  # fmt: skip
    options = [word for item in (*sets, "train.steps=100000") for word in ("--set", item)]
    command = [*HEADWAY, "train", str(small_job), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as child:
        try:
            assert child.stdout
            address = next(
                found[1] for line in child.stdout if (found := re.search(r"Prometheus: (\S+)", line))
            )
            assert any(line.startswith("step ") for line in child.stdout)
            with urllib.request.urlopen(address, timeout=30) as answer:
                families = {f.name: f for f in text_string_to_metric_families(answer.read().decode())}
            child.send_signal(signal.SIGTERM)
            child.stdout.read()
            assert child.wait() == 75
        finally:
            child.kill()
    assert address.startswith("http://127.0.0.1:")
    step = families["headway_step"].samples[0].value
    rows = read_metrics(tmp_path / "run")
    assert 1 <= step <= len(rows)
    (info,) = families["headway_run_info"].samples
    assert (info.labels["family"], info.labels["world"], info.labels["precision"]) == ("gpt", "1", "fp32")
    assert int(info.labels["parameters"]) > 1000

    saved = latest(tmp_path / "run/checkpoints")
    assert saved
    steps = (step_of(saved.name) or 0) + 5
    run.train([str(small_job)], [*sets, f"train.steps={steps}"])
    accumulator = EventAccumulator(
        str(tmp_path / "run/tensorboard"), {"scalars": 0, "histograms": 0}
    ).Reload()
    found = [
        (tag, e.step, e.value) for tag in accumulator.Tags()["scalars"] for e in accumulator.Scalars(tag)
    ]
    rows = read_metrics(tmp_path / "run")
    assert len(rows) == steps
    expected = [
        (tag_of(name), row["step"], float(np.float32(value)))
        for row in rows
        for name, value in row.items()
        if name != "step"
    ]
    assert sorted(found) == sorted(expected)
    tag = next(tag for tag in accumulator.Tags()["histograms"] if tag.startswith("gradients/"))
    assert [e.step for e in accumulator.Histograms(tag)] == list(range(5, steps + 1, 5))


@pytest.mark.matrix
def test_a_tracker_is_told_by_the_first_of_two_ranks(small_job, tmp_path):
    """Over torchrun's variables, which Accelerate would read in a rank's process."""
    if find_spec("mlflow") is None:
        pytest.skip("mlflow is not installed")
    sets = [f"run.dir={tmp_path}", "run.name=trial", "tracking.backends=[mlflow]", "tracking.project=proof"]
    options = [word for item in (*sets, "train.steps=4") for word in ("--set", item)]
    command = [*HEADWAY, "train", str(small_job), "--nproc", "2", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    points = read_tracker("mlflow", tmp_path / "trial/trackers/mlflow/files")
    expected = {
        (r["step"], k): v for r in read_metrics(tmp_path / "trial") for k, v in r.items() if k != "step"
    }
    assert {(step, name): value for step, name, value in points} == expected
    assert len(points) == len(expected)


def test_what_cannot_be_is_refused_before_a_run_begins(small_job, tmp_path, monkeypatch):
    sets = [f"run.dir={tmp_path}", "run.name=run"]
    with pytest.raises(JobError, match=r"tracking\.backends\.0 = 'tensorbord'.*tensorboard"):
        run.train([str(small_job)], [*sets, "tracking.backends=[tensorbord]"])
    with pytest.raises(JobError, match=r"tracking\.prometheus\.port.*tracking\.backends has no prometheus"):
        run.train([str(small_job)], [*sets, "tracking.prometheus.port=9000"])
    with pytest.raises(JobError, match=r"tracking\.prometheus\.port = 70000"):
        run.train([str(small_job)], [*sets, "tracking.prometheus.port=70000"])
    monkeypatch.setattr("headway.pretrain.records.backends.find_spec", lambda name: None)
    arguments = [str(small_job)], [*sets, "tracking.backends=[prometheus]"]
    with pytest.raises(JobError, match=r"tracking\.backends = 'prometheus'.*is not installed"):
        run.train(*arguments)
    with pytest.raises(JobError, match=r"tracking\.backends = 'prometheus'.*is not installed"):
        run.check(*arguments, 2)
    assert not (tmp_path / "run").exists()
