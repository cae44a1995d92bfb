"""Accelerate's trackers: the real packages, each read back with its own reader; what is not installed is skipped."""

import io
import json
import math
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from headway.pretrain.config import Job
from headway.pretrain.config.trackers import KEPT_BY_ACCELERATE
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import validate
from headway.pretrain.records.backends.base import Told
from headway.pretrain.records.backends.tracker import AccelerateTracker, environment, settings
from headway.pretrain.records.backends.tracker_manners import MANNERS
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import Records, open_records
from headway.tests.pretrain.records.backends.tracker_readers import READERS, read


def installed(name: str) -> None:
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed: docs/tracking.md says with which versions this was run")


def job(*names: str, steps: int = 1000, **trackers) -> Job:
    return Job.model_validate(
        {
            "run": {"name": "trial"},
            "train": {"steps": steps},
            "tracking": {
                "wandb": "off",
                "project": "proof",
                "backends": list(names),
                "trackers": trackers,
                "prompt": "a\nb",
            },
        }
    )


def row(step: int) -> dict:
    return {
        "step": step, "loss": math.nan if step == 3 else 1 / step, "lr": 1e-3, "tokens": 512, "experts/load": 0.25,
        "learned/states.0": 0.5 * step,
    }  # fmt: skip


def told(run_dir: Path, warnings: list[str], name: str, **trackers) -> Told:
    return Told(run_dir, job(name, **trackers), 0, warnings.append, lambda _: None)


def expected(run_dir: Path, finite: bool = False) -> dict[tuple[int, str], float]:
    """Every number of `metrics.jsonl`."""
    found = {
        (r["step"], k): math.nan if v is None else v
        for r in read_metrics(run_dir)
        for k, v in r.items()
        if k != "step"
    }
    return {k: v for k, v in found.items() if math.isfinite(v) or not finite}


def test_every_tracker_of_accelerate_has_its_manner_and_its_reader():
    assert set(KEPT_BY_ACCELERATE) == LOGGER_TYPE_TO_CLASS.keys() - {"wandb", "tensorboard"}
    assert MANNERS.keys() == READERS.keys() == set(KEPT_BY_ACCELERATE)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT_BY_ACCELERATE)
def test_a_run_that_goes_on_is_one_run_with_every_number_once(tmp_path, name, monkeypatch):
    """Stopped at step 8, gone on with from step 5, told of a setting that has changed."""
    installed(name)
    for key in ("RANK", "LOCAL_RANK"):  # a process group of two would wait for the other rank here
        monkeypatch.setenv(key, "1")
    for key in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(key, "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setenv("HOME", str(tmp_path))
    run_dir, stream = tmp_path / "run", io.StringIO()
    first = Records(run_dir, job(name), stream=stream)
    for step in range(1, 9):
        first.step(row(step))
    first.event("eval", heldout_loss=0.25)
    first.close("stopped")
    identity = json.loads((run_dir / f"trackers/{name}/told.json").read_text())["id"]
    second = Records(run_dir, job(name, steps=1200), start_step=5, stream=stream)
    for step in range(6, 11):
        second.step(row(step))
    second.close("done")
    note = json.loads((run_dir / f"trackers/{name}/told.json").read_text())
    assert (note["id"], note["step"]) == (identity, 10)
    points = read(name, run_dir / "trackers" / name / "files")
    assert len({point[:2] for point in points}) == len(points)  # none twice
    found = {(step, metric): value for step, metric, value in points}
    # Step 8 was evaluated before the stop, and is trained again after it, without an evaluation.
    assert found.pop((8, "heldout_loss")) == 0.25
    wanted = expected(run_dir, finite=name == "clearml")
    assert found.keys() == wanted.keys()
    # SwanLab keeps single precision, whose rounding is 2^-24 of a value at most.
    exact = 2**-24 if name == "swanlab" else 0.0
    assert all(
        math.isclose(found[k], v, rel_tol=exact) or math.isnan(found[k] + v) for k, v in wanted.items()
    )
    assert "stopped recording" not in stream.getvalue()


@pytest.mark.matrix
def test_a_killed_tracker_is_told_at_the_next_start_what_it_missed(tmp_path):
    installed("mlflow")
    run_dir, stream = tmp_path / "run", io.StringIO()
    first = Records(run_dir, job("mlflow"), stream=stream)
    os.killpg(first.backends[0].client.process.pid, signal.SIGKILL)
    for step in range(1, 9):
        first.step(row(step))
    first.close("stopped")
    assert stream.getvalue().count("the mlflow client ended early") == 1
    second = Records(run_dir, job("mlflow"), start_step=8, stream=stream)
    second.step(row(9))
    second.close("done")
    points = read("mlflow", run_dir / "trackers/mlflow/files")
    assert sorted(point[0] for point in points if point[1] == "lr") == list(range(1, 10))


def test_a_server_that_never_answers_delays_the_end_by_the_stated_time_only(tmp_path, monkeypatch):
    installed("mlflow")
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as server:  # accepts connections (its backlog) and says nothing
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        warnings: list[str] = []
        tracker = AccelerateTracker(told(tmp_path, warnings, "mlflow"), "mlflow", finish_timeout=1)
        for step in range(1, 2001):
            tracker.log(step, row(step))
        tracker.close("done", {})
    (warning,) = warnings
    assert "mlflow did not take the last data within 1 s; metrics.jsonl has everything" in warning
    with pytest.raises(ChildProcessError):  # nobody is left behind
        os.waitpid(tracker.client.process.pid, 0)


@pytest.mark.matrix
def test_arguments_that_a_tracker_does_not_have_end_the_telling_with_one_warning(tmp_path):
    installed("mlflow")
    warnings: list[str] = []
    tracker = AccelerateTracker(told(tmp_path, warnings, "mlflow", mlflow={"colour": "red"}), "mlflow")
    tracker.log(1, row(1))
    tracker.close("done", {})
    (warning,) = warnings
    assert "mlflow stopped recording" in warning
    assert "colour" in warning


@pytest.mark.matrix
def test_a_tracker_that_accelerate_may_have_later_needs_no_line_of_ours(tmp_path):
    """It is registered with Accelerate in the tracker's process, and refuses one step."""
    program = f"""
import sys
from accelerate.tracking import GeneralTracker, on_main_process, register_tracker_class
class Later(GeneralTracker):
    name, requires_logging_directory = "later", True
    def __init__(self, run_name, logging_dir, **kwargs):
        super().__init__()
        self.lines = [("new", run_name, logging_dir, kwargs)]
    @property
    def tracker(self):
        return self.lines
    @on_main_process
    def store_init_configuration(self, values):
        self.lines.append(values["train.steps"])
    @on_main_process
    def log(self, values, step=None):
        if step == 2:
            raise ConnectionError("no route")
        self.lines.append((step, values))
    @on_main_process
    def finish(self):
        print("KEPT", self.lines)
register_tracker_class(Later)
from headway.pretrain.records.backends.tracker_client import TrackerClient
import os
os.makedirs({str(tmp_path)!r} + "/later")
client = TrackerClient({{
    "name": "later", "folder": {str(tmp_path)!r} + "/later", "run_dir": {str(tmp_path)!r}, "start_step": 0,
    "words": {{"run": "r", "project": "p", "folder": {str(tmp_path)!r} + "/later/files"}},
    "arguments": {{"a": 1}}, "settings": {{"train.steps": 7}},
}})
for step in (1, 2, 3):
    client.obey({{"do": "log", "step": step, "values": {{"loss": 1.0}}}})
assert not client.obey({{"do": "finish"}})
import torch
assert not torch.distributed.is_initialized()
"""
    ranks = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
    }
    bare = {k: v for k, v in environment(MANNERS["aim"], {"folder": ""}).items() if k not in ranks}
    done = subprocess.run(
        [sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False, env=bare
    )
    assert done.returncode == 0, done.stderr
    kept = [("new", "p", f"{tmp_path}/later/files", {"a": 1}), 7, (1, {"loss": 1.0}), (3, {"loss": 1.0})]
    assert f"KEPT {kept}" in done.stdout
    assert "later did not take all of step 2 (ConnectionError: no route)" in done.stdout


def test_the_process_is_no_rank_and_keeps_to_the_run_folder_unless_told_otherwise(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "ACCELERATE_USE_FSDP", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    found = environment(MANNERS["mlflow"], {"folder": "/there"})
    assert not {
        "RANK",
        "WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "ACCELERATE_USE_FSDP",
        "TORCHELASTIC_RUN_ID",
    } & {*found}
    assert found["MLFLOW_TRACKING_URI"] == "file:/there"
    assert found["CUDA_VISIBLE_DEVICES"] == ""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLEARML_CONFIG_FILE", raising=False)
    assert environment(MANNERS["clearml"], {"folder": "/there"})["CLEARML_OFFLINE_MODE"] == "1"
    (tmp_path / "clearml.conf").touch()
    assert "CLEARML_OFFLINE_MODE" not in environment(MANNERS["clearml"], {"folder": "/there"})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mine")
    found = environment(MANNERS["mlflow"], {"folder": "/there"})
    assert found["MLFLOW_TRACKING_URI"] == "http://mine"
    assert "MLFLOW_ALLOW_FILE_STORE" not in found


def test_settings_are_plain(tmp_path):
    found = settings(job("mlflow", mlflow={"tags": {"a": "b"}}))
    assert found["train.steps"] == 1000
    assert found["train.start_from"] is None
    assert found["tracking.backends"] == "[mlflow]"
    assert all(value is None or isinstance(value, bool | int | float | str) for value in found.values())


def test_names_are_checked_before_anything_begins(tmp_path, monkeypatch):
    with pytest.raises(JobError, match=r"tracking\.backends\.0 = 'mlfow'.*Nearest legal choice: mlflow"):
        validate({"tracking": {"backends": ["mlfow"]}})
    with pytest.raises(JobError, match=r"tracking\.backends\.0 = 'wandb': headway tells W&B by itself"):
        validate({"tracking": {"backends": ["wandb"]}})
    target = "headway.pretrain.records.backends.find_spec"
    monkeypatch.setattr(target, lambda name: None)
    with pytest.raises(JobError, match=r"tracking\.backends = 'swanlab'.*pip install swanlab"):
        open_records(tmp_path / "run", job("swanlab"))
    monkeypatch.setattr(target, lambda name: name)
    with pytest.raises(JobError, match=r"tracking\.trackers\.aim = .*of Accelerate's: mlflow"):
        open_records(tmp_path / "run", job("mlflow", aim={"a": 1}))
