"""The one object that the training loop calls."""

import errno
import io
import os

import pytest
import torch

from headway.pretrain.config import Job
from headway.pretrain.records import backends as module
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import NoRecords, Records, histogram, open_records, read_events

JOB = Job.model_validate({"train": {"steps": 4}, "tracking": {"wandb": "off", "histograms_every": 2}})


def row(step: int) -> dict:
    return {"step": step, "loss": 1 / step}


def test_only_the_first_rank_records(tmp_path):
    other = open_records(tmp_path / "run", JOB, rank=1)
    assert isinstance(other, NoRecords)
    other.step(row(1))
    other.event("eval", heldout_loss=1.0)
    other.histograms(2, {"w": torch.ones(2)})
    other.close()
    assert not other.wants_histograms(2)
    assert not (tmp_path / "run").exists()
    first = open_records(tmp_path / "run", JOB, rank=0, stream=io.StringIO())
    first.step(row(1))
    first.close()
    assert read_metrics(tmp_path / "run") == [row(1)]


def test_steps_and_events_are_told_to_file_and_screen(tmp_path):
    stream = io.StringIO()
    records = Records(tmp_path, JOB, stream=stream)
    records.step(row(1))
    records.step(row(2))
    records.event("eval", heldout_loss=torch.tensor(0.25), rows=64)
    records.event("checkpoint", step=2, path=tmp_path / "checkpoints" / "step_00000002")
    records.event("warning", message="slow disk [x]")
    records.close("stopped")
    assert read_metrics(tmp_path) == [row(1), {**row(2), "heldout_loss": 0.25, "rows": 64}]
    events = read_events(tmp_path)
    assert [e["kind"] for e in events] == ["start", "eval", "checkpoint", "warning", "end"]
    assert events[-1]["status"] == "stopped"
    assert all(e["step"] == 2 for e in events[1:])
    assert "heldout loss 0.25" in stream.getvalue()
    assert "warning: slow disk [x]" in stream.getvalue()


def test_a_resumed_run_cuts_steps_but_keeps_its_history(tmp_path):
    first = Records(tmp_path, JOB, stream=io.StringIO())
    for step in (1, 2, 3):
        first.step(row(step))  # and is killed
    second = Records(tmp_path, JOB, start_step=2, stream=io.StringIO())
    for step in (3, 4):
        second.step(row(step))
    second.close()
    assert read_metrics(tmp_path) == [row(step) for step in (1, 2, 3, 4)]
    assert [(e["kind"], e["step"]) for e in read_events(tmp_path)] == [
        ("start", 0),
        ("resume", 2),
        ("end", 4),
    ]


def test_a_full_disk_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch):
    stream = io.StringIO()
    records = Records(tmp_path, JOB, stream=stream)
    records.step(row(1))
    real = os.pwrite

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    records.step(row(2))
    records.step(row(3))
    assert stream.getvalue().count("No space left on device; the run goes on") == 1
    monkeypatch.setattr(os, "pwrite", real)
    records.step(row(4))
    records.close()
    assert read_metrics(tmp_path) == [row(step) for step in (1, 2, 3, 4)]


def test_a_client_that_cannot_be_started_is_a_warning(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("cannot fork")

    monkeypatch.setattr(module, "WandbTracker", fail)
    stream = io.StringIO()
    records = Records(tmp_path, JOB, mode="offline", stream=stream)
    records.step(row(1))
    records.close()
    assert "warning: no W&B: cannot fork" in stream.getvalue()


def test_histograms_agree_with_numpy():
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    found = histogram(values, bins=16)
    assert found
    counts, edges = found
    numpy = pytest.importorskip("numpy")
    expected, expected_edges = numpy.histogram(values.double().numpy(), bins=16)
    # Edges are computed in fp64 here and the bins in fp32: a value on an edge may fall to either side.
    assert numpy.abs(numpy.array(counts) - expected).sum() <= 4
    assert numpy.allclose(edges, expected_edges)
    assert sum(counts) == 10_000


@pytest.mark.parametrize(
    ("values", "total"),
    [([], 0), ([float("nan")], 0), ([2.0, 2.0], 2), ([0.0], 1), ([1.0, float("inf"), -1.0, float("nan")], 2)],
)
def test_histograms_take_finite_values_only(values, total):
    found = histogram(torch.tensor(values))
    assert (sum(found[0]) if found else 0) == total
