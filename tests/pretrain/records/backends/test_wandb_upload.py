"""What reaches a W&B server: online, by `wandb sync`, over outages; the server is `wandb_server.py`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from headway.launch import run
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.config import Job
from headway.pretrain.errors import NonFiniteError
from headway.pretrain.records.backends.base import Gallery, Picture, Table, Told
from headway.pretrain.records.backends.wandb import WandbTracker
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import Records, read_events
from headway.tests.chosen import first
from headway.tests.pretrain.records.backends.wandb_server import ENTITY, KEY, StoredRun, WandbServer


@pytest.fixture
def server(monkeypatch, tmp_path):
    with WandbServer() as found:
        monkeypatch.delenv("WANDB_MODE", raising=False)
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        yield found


def job(**tracking) -> Job:
    return Job.model_validate({"train": {"steps": 20}, "tracking": {"project": "proof", **tracking}})


def live(run_dir: Path, steps: range, status: str = "done", mode: str = "online", **more) -> Records:
    """One incarnation of a run that goes on after step `steps[0] - 1`."""
    records = Records(run_dir, job(), start_step=steps[0] - 1, mode=mode, stream=io.StringIO(), **more)
    for step in steps:
        records.step({"step": step, "loss": 1 / step, "tokens": 5})
        if step % 4 == 0:
            records.event("eval", heldout_loss=abs(step - 8) + 0.5)
    records.close(status)
    return records


def sync(run_dir: Path, *more: str) -> None:
    command = [sys.executable, "-m", "wandb", "sync", *more, *map(str, run_dir.glob("wandb/offline-run-*"))]
    subprocess.run(command, check=True, capture_output=True, timeout=120)


def points(stored: StoredRun) -> list[dict]:
    """Uploaded history in order of arrival, without what the client adds."""
    return [{"step": r["_step"], **{k: v for k, v in r.items() if k[0] != "_"}} for r in stored.rows()]


def records_told(run_dir: Path, warnings: list[str]) -> Told:
    return Told(run_dir, job(), 0, warnings.append, lambda _: None)


def with_a_bad_step(step: int, monkeypatch) -> None:
    """Let the loss of one step be NaN."""
    real = NativeEngine.train_step

    def train_step(self, batch, index, watch=None):
        if index + 1 == step:
            raise NonFiniteError(f"the loss is nan at step {step}")
        return real(self, batch, index, watch)

    monkeypatch.setattr(NativeEngine, "train_step", train_step)


def only(server: WandbServer) -> StoredRun:
    (stored,) = server.runs.values()
    return stored


def test_an_online_run_arrives_whole(server, tmp_path):
    picture = io.BytesIO()
    Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8)).save(picture, "PNG")
    tracking = {
        "entity": "others",
        "group": "g",
        "job_type": "pretrain",
        "tags": ["a", "b"],
        "notes": "n",
        "x_axis": "tokens",
    }
    run_dir, stored_data = tmp_path / "run", tmp_path / "train.bin"
    stored_data.write_bytes(b"tokens")
    data = {"name": "some/text.jsonl", "uri": stored_data.as_uri(), "fingerprint": "abc", "tokens": 9}
    records = Records(
        run_dir, job(**tracking), facts={"parameters": 7, "data": [data]}, mode="online", stream=io.StringIO()
    )
    for step in range(1, 21):
        records.step({"step": step, "loss": 1 / step, "tokens": 5})
    records.event("eval", heldout_loss=0.25)
    table = Table(("step", "prompt", "completion"), [(20, "a", "b"), (20, "ü", "\n")])
    records.show(Gallery({"samples": table}, {"attention/layer_01": [Picture(picture.getvalue(), "head 1")]}))
    (run_dir / "report.html").write_text("<p>report</p>")
    (run_dir / "job.yaml").write_text("run: {}")
    (run_dir / "checkpoints/step_00000020").mkdir(parents=True)
    (run_dir / "checkpoints/step_00000020/w.safetensors").write_bytes(b"weights")
    records.event("checkpoint", step=20, path=run_dir / "checkpoints/step_00000020")
    records.close("done", {"bits_per_byte": 1.5})

    stored = only(server)
    bucket = stored.bucket
    assert [bucket[k] for k in ("entity", "project", "groupName", "jobType", "notes", "displayName")] == [
        "others", "proof", "g", "pretrain", "n", "run"]  # fmt: skip
    assert sorted(bucket["tags"]) == ["a", "b"]
    assert stored.config["model"]["hidden"] == 768
    assert stored.config["facts"]["parameters"] == 7
    assert stored.complete
    assert stored.exit_code == 0

    plain = [
        {k: v for k, v in p.items() if k not in ("samples", "attention/layer_01")} for p in points(stored)
    ]
    assert plain == read_metrics(run_dir)
    assert plain[-1]["tokens_seen"] == 100
    assert stored.summary["best_heldout_loss"] == 0.25
    assert stored.summary["bits_per_byte"] == 1.5
    axes = [m for m in stored.config["_wandb"]["m"] if m.get("6") or m.get("5")]
    assert axes, "the x axis is a metric of its own"

    last = points(stored)[-1]
    rows = json.loads(stored.files[last["samples"]["path"]])
    assert rows["columns"] == list(table.columns)
    assert rows["data"] == [list(row) for row in table.rows]
    (image,) = last["attention/layer_01"]["filenames"]
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored.files[image]))).ravel(), np.arange(64))
    assert stored.files["report.html"] == b"<p>report</p>"
    assert stored.files["job.yaml"] == b"run: {}"

    by_type = {a["artifactTypeName"]: a for a in server.artifacts}
    (entry,) = by_type["checkpoint"]["stored"]["contents"].values()
    assert entry["ref"] == (run_dir / "checkpoints/step_00000020/w.safetensors").as_uri()
    data = by_type["dataset"]
    assert json.loads(data["metadata"])["fingerprint"] == "abc"
    assert server.used == [str(server.artifacts.index(data))]  # an input of the run, not an output


@pytest.mark.matrix
def test_unset_names_come_from_the_environment(server, tmp_path, monkeypatch):
    for name, value in {"PROJECT": "p", "ENTITY": "e", "RUN_GROUP": "g", "JOB_TYPE": "j", "NOTES": "n", "TAGS": "x,y",
                        "RUN_ID": "chosen"}.items():  # fmt: skip
        monkeypatch.setenv(f"WANDB_{name}", value)
    records = Records(tmp_path / "run", Job(), mode="online", stream=io.StringIO())
    records.step({"step": 1, "loss": 1.0})
    records.close()
    bucket = server.runs["chosen"].bucket
    assert [bucket[k] for k in ("project", "entity", "groupName", "jobType", "notes", "tags")] == [
        "p", "e", "g", "j", "n", ["x", "y"]]  # fmt: skip
    for name in ("PROJECT", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{name}")
    monkeypatch.setenv("WANDB_RUN_ID", "other")
    live(tmp_path / "other", range(1, 3))
    records = Records(tmp_path / "third", Job(), mode="online", stream=io.StringIO())
    records.close()
    assert [server.runs["other"].bucket[k] for k in ("project", "entity")] == ["headway", ENTITY]


@pytest.mark.parametrize(
    "modes",
    [
        ("online", "online"),
        pytest.param(("offline", "offline"), marks=pytest.mark.matrix),
        pytest.param(("offline", "online"), marks=pytest.mark.matrix),
    ],
)
def test_a_rewound_run_has_every_step_once(server, tmp_path, modes):
    """Steps 11 to 14 are computed twice. An online incarnation uploads what was recorded offline before it."""
    run_dir = tmp_path / "run"
    live(run_dir, range(1, 15), "stopped", modes[0])
    live(run_dir, range(11, 21), mode=modes[1])
    sync(run_dir)
    sync(run_dir)  # a second time changes nothing
    assert points(only(server)) == read_metrics(run_dir)
    assert [p["step"] for p in points(only(server))] == list(range(1, 21))
    summary = only(server).summary
    assert [summary["best_heldout_loss"], summary["best_heldout_step"], summary["heldout_loss"]] == [
        0.5,
        8,
        12.5,
    ]


@pytest.mark.matrix
def test_steps_that_a_dead_server_missed_are_made_up_for(server, tmp_path):
    """W&B's log of the first incarnation ends early, as that of a machine that lost power."""
    run_dir = tmp_path / "run"
    live(run_dir, range(1, 7), "stopped")
    (run_dir / "metrics.jsonl").unlink()
    live(run_dir, range(1, 11), "stopped", "off")
    live(run_dir, range(11, 21))
    assert [p["step"] for p in points(only(server))] == list(range(1, 21))
    assert points(only(server)) == read_metrics(run_dir)


@pytest.mark.matrix
def test_a_curve_that_differs_from_the_one_in_wandb_is_a_warning(server, tmp_path):
    run_dir = tmp_path / "run"
    live(run_dir, range(1, 15), "stopped")
    records = Records(run_dir, job(), start_step=10, mode="online", stream=io.StringIO())
    for step in range(11, 21):
        records.step({"step": step, "loss": 2 / step, "tokens": 5})
    records.close()
    (warning,) = (e["message"] for e in read_events(run_dir) if e["kind"] == "warning")
    assert "W&B keeps the steps up to 14" in warning
    assert "run.name" in warning


def test_alerts_follow_what_happened(server, tmp_path):
    run_dir = tmp_path / "run"
    records = Records(run_dir, job(), mode="online", stream=io.StringIO())
    for _ in range(3):  # one message of a kind in half an hour
        records.event("warning", message="no checkpoint: disk full", about="checkpoint")
    records.event("warning", message="something else")
    records.event("failure", error="NonFiniteError", message="loss is nan at step 3")
    records.close("failed")
    records = Records(tmp_path / "second", job(alerts=["done"]), mode="online", stream=io.StringIO())
    records.event("failure", error="OSError", message="nobody asked for this one")
    records.close("done")
    assert [(a["title"], a["severity"]) for a in server.alerts] == [
        ("run: has no new checkpoint", "WARN"),
        ("run: diverged", "ERROR"),
        ("second: done", "INFO"),
    ]
    assert "loss is nan at step 3" in server.alerts[1]["text"]
    assert server.alerts[0]["waitDuration"] == 1_800_000  # milliseconds


@pytest.mark.matrix
def test_a_killed_training_process_is_an_alert(server, tmp_path):
    program = f"""
import io, os, signal
from pathlib import Path
from headway.parallel.engines.native import NativeEngine
from headway.pretrain.config import Job
from headway.pretrain.records.records import Records
records = Records(Path({str(tmp_path / "run")!r}), Job(), mode="online", stream=io.StringIO())
records.step({{"step": 1, "loss": 1.0}})
print(records.backends[0].client.process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, check=False)
    assert server.wait_for(lambda: server.alerts and only(server).complete)
    assert [(a["title"], a["severity"]) for a in server.alerts] == [("run: killed", "ERROR")]
    assert only(server).exit_code == 1


def test_a_real_run_killed_and_resumed_equals_its_metrics(server, small_job, tmp_path, monkeypatch):
    """Offline, then uploaded; `headway train` in this process, stopped by a loss that is not finite."""
    sets = [
        f"run.dir={tmp_path}",
        "run.name=run",
        "tracking.wandb=offline",
        "train.eval_every=4",
        "tracking.samples_every=6",
    ]
    with monkeypatch.context() as patch:
        with_a_bad_step(15, patch)
        with pytest.raises(NonFiniteError):
            run.train([str(small_job)], sets)
    run.train([str(small_job)], sets)
    run_dir = tmp_path / "run"
    sync(run_dir)
    stored, metrics = only(server), read_metrics(run_dir)
    media = ("samples", "attention/layer_01", "attention/layer_02")
    told = [{k: v for k, v in p.items() if k not in media} for p in points(stored)]
    assert [p["step"] for p in told] == list(range(21))  # 0: the evaluation before training
    # Steps 11 to 14 were computed twice; what depends on the clock is another.
    clock = {"tokens_per_second", "step_seconds", "mfu", "memory_gib", "joules", "watts"}
    for point, row in zip(told[1:], metrics, strict=True):
        drop = clock if 11 <= row["step"] <= 14 else set()
        assert {k: v for k, v in point.items() if k not in drop} == {
            k: v for k, v in row.items() if k not in drop
        }
    assert [p["step"] for p in points(stored) if "samples" in p] == [6, 12, 18, 20]
    assert stored.config["facts"]["parameters"] > 0
    assert [a["artifactTypeName"] for a in server.artifacts].count("dataset") == 2
    assert {a["title"] for a in server.alerts} == {"run: diverged", "run: done"}
    assert {"report.html", "job.yaml", "summary.json"} <= set(stored.files)
    holders = [p for p in tmp_path.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert holders == []


class Exporter(BaseHTTPRequestHandler):
    """A page of Prometheus, with the load of a GPU."""

    def do_GET(self) -> None:
        page = b'# TYPE DCGM_FI_DEV_GPU_UTIL gauge\nDCGM_FI_DEV_GPU_UTIL{gpu="0"} 87\n'
        self.send_response(200)
        self.send_header("Content-Type", "text/plain; version=0.0.4")
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        self.wfile.write(page)

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.mark.matrix
def test_exporters_of_other_nodes_are_system_metrics(server, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Exporter) as exporter:
        threading.Thread(target=exporter.serve_forever, args=(0.02,), daemon=True).start()
        address = f"http://127.0.0.1:{exporter.server_address[1]}/metrics"
        records = Records(
            tmp_path / "run", job(exporters={"node2": address}), mode="online", stream=io.StringIO()
        )

        def told() -> set[str]:
            rows = [row for stored in server.runs.values() for row in stored.rows("wandb-events.jsonl")]
            return {name for row in rows for name, value in row.items() if value == 87}

        assert server.wait_for(told)
        records.close()
        exporter.shutdown()
    (name,) = told()
    assert "node2" in name
    assert "DCGM_FI_DEV_GPU_UTIL" in name
    ours = {name for row in only(server).rows("wandb-events.jsonl") for name in row}
    assert "system.proc.memory.rssMB" in ours  # of the training process
    assert any(str(tmp_path / "run") in name for name in ours)  # the disk of the run folder


# -- a server that fails ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", first(1, (401, 403, 500, 429)))
def test_a_server_that_answers_with_an_error_leaves_an_offline_run_and_one_warning(server, tmp_path, status):
    server.status = status
    warnings, run_dir = [], tmp_path / "run"
    tracker = WandbTracker(records_told(run_dir, warnings), "online", init_timeout=3)
    for step in range(1, 4):
        tracker.log(step, {"loss": 1.0})
    tracker.finish()
    (warning,) = warnings
    assert "recorded offline" in warning
    server.status = 0
    sync(run_dir)
    assert [p["step"] for p in points(only(server))] == [1, 2, 3]
    assert [p for p in run_dir.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()] == []


@pytest.mark.matrix
def test_a_server_that_dies_midway_is_caught_up_with_by_the_next_incarnation(server, tmp_path):
    run_dir, warnings = tmp_path / "run", []
    tracker = WandbTracker(records_told(run_dir, warnings), "online", finish_timeout=4)
    metrics = Records(run_dir, job(), mode="off", stream=io.StringIO())
    for step in range(1, 15):
        values = {"step": step, "loss": 1 / step}
        metrics.step(values)
        tracker.log(step, values)
        if step == 7:
            assert server.wait_for(lambda: server.runs and only(server).rows())
            server.status = 500
    tracker.finish()
    (warning,) = warnings
    assert "wandb sync --include-online --id" in warning
    server.status = 0
    before = [p["step"] for p in points(only(server))]
    assert before[-1] < 14
    log = next(run_dir.glob("wandb/run-*"))
    subprocess.run([sys.executable, "-m", "wandb", "sync", "--include-online", "--id", "again", str(log)], check=True,
                   capture_output=True, timeout=120)  # fmt: skip
    assert [p["step"] for p in points(server.runs.pop("again"))] == list(range(1, 15))
    live(run_dir, range(11, 21))
    assert [p["step"] for p in points(only(server))] == list(range(1, 21))
