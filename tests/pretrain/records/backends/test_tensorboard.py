"""Event files, read back with TensorBoard's own reader."""

import io
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util import tensor_util

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.records.backends.tensorboard import tag_of
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import Records, histogram, open_records

JOB = Job.model_validate(
    {"tracking": {"wandb": "off", "backends": ["tensorboard"], "histograms_every": 2, "prompt": "a | b"}}
)


def row(step: int, life: int = 1) -> dict:
    return {
        "step": step, "loss": life / step, "lr": 1e-3, "tokens": 512, "tokens_per_second": 1e4, "mfu": 0.4,
        "step_seconds": 0.5, "memory_gib": 1.5, "experts/load": 0.25,
    }  # fmt: skip


def read(run_dir: Path) -> EventAccumulator:
    everything = dict.fromkeys(("scalars", "histograms", "tensors", "compressedHistograms", "images"), 0)
    return EventAccumulator(str(run_dir / "tensorboard"), size_guidance=everything).Reload()


def scalars(found: EventAccumulator) -> dict[tuple[str, int], float]:
    points = [(tag, e.step, e.value) for tag in found.Tags()["scalars"] for e in found.Scalars(tag)]
    assert len({(tag, step) for tag, step, _ in points}) == len(points)  # no point twice
    return {(tag, step): value for tag, step, value in points}


def expected(run_dir: Path) -> dict[tuple[str, int], float]:
    """Every number of `metrics.jsonl`, in the single precision of event files."""
    return {
        (tag_of(name), r["step"]): float(np.float32(value))
        for r in read_metrics(run_dir)
        for name, value in r.items()
        if name != "step"
    }


def text(found: EventAccumulator, tag: str) -> list[str]:
    events = found.Tensors(f"{tag}/text_summary")
    return [tensor_util.make_ndarray(e.tensor_proto)[0].decode() for e in events]


def test_names_are_grouped():
    names = ["loss", "heldout_loss", "bits_per_byte", "mfu", "memory_gib", "learned/states.0", "joules"]
    assert list(map(tag_of, names)) == [
        "train/loss", "heldout/loss", "heldout/bits_per_byte", "speed/mfu", "memory/memory_gib",
        "train/learned/states.0", "energy/joules",
    ]  # fmt: skip


def test_every_point_of_metrics_jsonl_is_there_across_a_resume(tmp_path):
    first = Records(tmp_path, JOB, stream=io.StringIO())
    for step in range(1, 9):
        first.step(row(step))
    first.event("eval", heldout_loss=9.0)
    first.close("stopped")
    assert scalars(read(tmp_path)) == expected(tmp_path)
    second = Records(tmp_path, JOB, start_step=5, stream=io.StringIO())
    assert max(r["step"] for r in read_metrics(tmp_path)) == 5
    second.event("eval", heldout_loss=2.0)
    for step in range(6, 11):
        second.step(row(step, life=2))
    second.event("eval", heldout_loss=0.125, bits_per_byte=1.5)
    second.close("done")
    found = scalars(read(tmp_path))
    assert found == expected(tmp_path)
    assert found["train/loss", 8] == 0.25
    assert found["heldout/loss", 5] == 2.0


def test_what_a_killed_run_left_is_read_as_far_as_it_goes(tmp_path):
    first = Records(tmp_path, JOB, stream=io.StringIO())
    for step in range(1, 9):
        first.step(row(step))
    first.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-7])
    second = Records(tmp_path, JOB, start_step=4, stream=io.StringIO())
    for step in range(5, 7):
        second.step(row(step, life=2))
    second.close()
    assert scalars(read(tmp_path)) == expected(tmp_path)


def test_histograms_job_and_warnings(tmp_path):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    records = Records(tmp_path, JOB, stream=io.StringIO())
    for step in (1, 2):
        if records.wants_histograms(step):
            records.histograms(step, {"w": values})
        records.step(row(step))
    records.event("warning", message="slow disk")
    records.event("checkpoint", path=tmp_path / "checkpoints/step_00000002")
    records.close()
    found = read(tmp_path)
    (event,) = found.Histograms("gradients/w")
    counts, edges = histogram(values)
    assert event.step == 2
    drawn = event.histogram_value
    assert (drawn.min, drawn.max, drawn.num) == (edges[0], edges[-1], 1000)
    assert list(drawn.bucket) == counts
    assert list(drawn.bucket_limit) == edges[1:]
    assert drawn.sum == pytest.approx(
        values.sum().item(), abs=1000 * (edges[1] - edges[0]) / 2
    )  # half a bin each
    (job,) = text(found, "job")
    assert "| `train.steps` | `1000` |" in job
    assert "a \\| b" in job
    assert text(found, "warnings") == ["slow disk"]
    assert text(found, "checkpoints")[0].endswith("step_00000002")
    assert "_hparams_/experiment" in found.summary_metadata


def test_a_writer_that_fails_is_told_once_and_the_run_goes_on(tmp_path, monkeypatch):
    stream = io.StringIO()
    records = Records(tmp_path, JOB, stream=stream)

    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records.backends[0]._writer, "add_scalar", fail)
    for step in (1, 2, 3):
        records.step({**row(step), "loss": math.nan})
    records.close()
    assert stream.getvalue().count("TensorBoard is told no more") == 1
    assert len(read_metrics(tmp_path)) == 3
    (tmp_path / "other").mkdir()
    (tmp_path / "other/tensorboard").write_text("in the way")
    records = Records(tmp_path / "other", JOB, stream=stream)
    records.step(row(1))
    records.close()
    assert "no tensorboard" in stream.getvalue()


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "tensorboard"), ("prometheus", "prometheus_client")]
)
def test_what_is_not_installed_is_named_before_anything_begins(tmp_path, monkeypatch, name, package):
    real = sys.modules["importlib.util"].find_spec
    target = "headway.pretrain.records.backends.find_spec"
    monkeypatch.setattr(target, lambda asked: None if asked == package else real(asked))
    job = Job.model_validate({"tracking": {"wandb": "off", "backends": [name]}})
    with pytest.raises(JobError, match=rf"tracking\.backends = '{name}'.*pip install 'headway\[{name}\]'"):
        open_records(tmp_path / "run", job)
