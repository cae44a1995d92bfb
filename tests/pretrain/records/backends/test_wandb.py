"""W&B through its real client, offline, read back with its own reader; and what happens when it fails."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.records.backends.base import Told
from headway.pretrain.records.backends.wandb import WandbTracker, has_api_key, wandb_mode
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import Records

KEY = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch, tmp_path):
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "home").mkdir()


def inspect(path: Path) -> list[dict]:
    """Records of one `.wandb` file, as W&B's own reader prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def histories(run_dir: Path) -> list[dict[int, dict]]:
    """Step -> values of every incarnation, in order of start."""
    found = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/run-*.wandb")):
        items = [r["history"]["item"] for r in inspect(path) if r["type"] == "history"]
        found.append({item["_step"]: {k: v for k, v in item.items() if k[0] != "_"} for item in items})
    return found


def job(**tracking) -> Job:
    return Job.model_validate({"tracking": {"project": "proof", "tags": ["a"], **tracking}})


def told(run_dir: Path, warnings: list[str], **tracking) -> Told:
    return Told(run_dir, job(**tracking), 0, warnings.append, lambda _: None, facts={"parameters": 7})


def row(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "lr": 1e-3, "tokens": 512}


def test_mode_follows_key_environment_and_request(monkeypatch, tmp_path):
    assert wandb_mode("auto") == "offline"
    assert wandb_mode("off") == "off"
    with pytest.raises(JobError, match=r"tracking\.wandb = 'online'.*WANDB_API_KEY.*offline"):
        wandb_mode("online")
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {KEY}\n")
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_api_key()  # the key is another server's
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert wandb_mode("auto") == wandb_mode("online") == "online"
    for value, mode in (("offline", "offline"), ("disabled", "off")):
        monkeypatch.setenv("WANDB_MODE", value)
        assert wandb_mode("auto") == mode


def test_an_offline_run_holds_what_metrics_jsonl_holds(tmp_path, capfd):
    run_dir, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "step_00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "shard.safetensors").write_bytes(b"weights")
    records = Records(run_dir, job(histograms_every=2), mode="offline")
    for step in range(1, 6):
        if records.wants_histograms(step):
            records.histograms(step, {"w": torch.linspace(-1, 1, 101)})
        records.step(row(step))
    records.event("checkpoint", step=4, path=checkpoint)
    records.event("eval", heldout_loss=0.125)
    records.close("done", {"bits_per_byte": 1.5})

    (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    (history,) = histories(run_dir)
    scalars = {
        step: {k: v for k, v in values.items() if "gradients" not in k} for step, values in history.items()
    }
    expected = {r["step"]: {k: v for k, v in r.items() if k != "step"} for r in read_metrics(run_dir)}
    assert scalars == expected
    assert expected[5]["heldout_loss"] == 0.125
    assert [s for s, values in history.items() if any("gradients/w" in k for k in values)] == [2, 4]
    counts = next(v for k, v in history[2].items() if k.startswith("gradients/w") and k.endswith("values"))
    assert sum(counts) == 101

    found = inspect(path)
    (run,) = (r["run"] for r in found if r["type"] == "run")
    assert run["project"] == "proof"
    assert run["config"]["update"]["model"]["hidden"] == 768
    (artifact,) = (r["artifact"] for r in found if r["type"] == "artifact")
    assert sorted(artifact["aliases"]) == ["latest", "step-4"]
    (entry,) = artifact["manifest"]["contents"]
    assert entry["ref"] == (checkpoint / "shard.safetensors").as_uri()
    summary = {k: v for r in found if r["type"] == "summary" for k, v in r["summary"]["update"].items()}
    assert summary["bits_per_byte"] == 1.5
    assert "wandb" not in capfd.readouterr().err  # a quiet console


def test_a_resumed_run_goes_on_under_the_same_id_and_tells_each_step_once(tmp_path):
    """`wandb sync` would give steps that the server has other numbers: see `wandb_past.py`."""
    run_dir = tmp_path / "run"
    first = Records(run_dir, job(), mode="offline")
    for step in range(1, 9):
        first.step(row(step))
    first.close("stopped")
    second = Records(run_dir, job(), start_step=5, mode="offline")
    for step in range(6, 11):
        second.step(row(step))
    second.close("done")
    earlier, later = histories(run_dir)
    assert list(earlier) == list(range(1, 9))
    assert list(later) == [9, 10]
    together = {**earlier, **later}
    assert together == {r["step"]: {k: v for k, v in r.items() if k != "step"} for r in read_metrics(run_dir)}
    names = {path.name for path in run_dir.glob("wandb/offline-run-*/run-*.wandb")}
    assert names == {f"run-{json.loads((run_dir / 'wandb' / 'run.json').read_text())['id']}.wandb"}


@pytest.mark.matrix
def test_a_killed_run_loses_no_step_that_was_logged(tmp_path):
    """The client outlives a SIGKILL of the training process and finishes the run."""
    run_dir = tmp_path / "run"
    program = f"""
import os, signal
from pathlib import Path
from headway.pretrain.config import Job
from headway.pretrain.records.records import Records
records = Records(Path({str(run_dir)!r}), Job(), mode="offline")
for step in range(1, 501):
    records.step({{"step": step, "loss": 1.0 / step}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    # Orphans become children of a process between, which can wait for their end.
    reaper = f"""
import ctypes, os, signal, subprocess, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
done = subprocess.run([sys.executable, "-c", {program!r}])
assert done.returncode == -signal.SIGKILL
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"""
    subprocess.run([sys.executable, "-c", reaper], stdout=subprocess.DEVNULL, check=True)
    (history,) = histories(run_dir)
    assert list(history) == list(range(1, 501))
    assert [r["step"] for r in read_metrics(run_dir)] == list(range(1, 501))


@pytest.mark.matrix
def test_a_server_that_refuses_leaves_an_offline_run_and_one_warning(tmp_path, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")  # nobody listens there any more
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    warnings: list[str] = []
    run_dir = tmp_path / "run"
    tracker = WandbTracker(told(run_dir, warnings), "online", init_timeout=2)
    for step in range(1, 4):
        tracker.log(step, row(step))
    tracker.finish()
    (warning,) = warnings
    assert "recorded offline" in warning
    assert f"wandb sync {run_dir}" in warning
    assert [list(h) for h in histories(run_dir)] == [[1, 2, 3]]
    secrets = [p for p in run_dir.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert secrets == []


def test_a_server_that_never_answers_delays_the_end_by_the_stated_time_only(tmp_path, monkeypatch):
    """Without the bound this would take W&B's own patience: here ten minutes."""
    with socket.create_server(
        ("127.0.0.1", 0)
    ) as server:  # accepts connections (its backlog) and says nothing
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        warnings: list[str] = []
        run_dir = tmp_path / "run"
        tracker = WandbTracker(told(run_dir, warnings), "online", init_timeout=600, finish_timeout=1)
        for step in range(1, 2001):
            tracker.log(step, row(step))
        tracker.finish()
        assert "did not take the last data within 1 s" in warnings[0]
        with pytest.raises(ChildProcessError):  # nobody is left behind
            os.waitpid(tracker.client.process.pid, 0)


def test_a_client_that_dies_or_stops_reading_does_not_disturb_the_run(tmp_path):
    warnings: list[str] = []
    tracker = WandbTracker(told(tmp_path / "a", warnings), "offline")
    os.killpg(tracker.client.process.pid, signal.SIGKILL)
    for step in range(1, 2000):
        tracker.log(step, row(step))
    tracker.finish()
    assert ["ended early" in warning for warning in warnings] == [True]

    tracker = WandbTracker(told(tmp_path / "b", warnings), "offline")
    os.killpg(tracker.client.process.pid, signal.SIGSTOP)
    text = {"blob": "x" * 2**20}
    for step in range(1, 80):  # more than the pipe and the buffer hold
        tracker.log(step, text)
    tracker.finish()
    assert any("does not read any more" in warning for warning in warnings)
    assert tracker.client.process.returncode == -signal.SIGKILL


def test_off_starts_no_client(tmp_path):
    records = Records(tmp_path / "run", job(wandb="off"), mode="off")
    records.step(row(1))
    records.close()
    assert sorted(os.listdir(tmp_path / "run")) == ["events.jsonl", "metrics.jsonl"]
