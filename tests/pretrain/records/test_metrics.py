"""metrics.jsonl: each step once, through kills, full disks and numbers that are none."""

import errno
import json
import math
import os
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from headway.pretrain.engine import StepResult
from headway.pretrain.errors import DataError
from headway.pretrain.records.metrics import MetricsFile, peak_memory_gib, read_metrics, step_values


def row(step: int) -> dict:
    return {"step": step, "loss": 1 / step, "lr": 1e-3}


def write(path, steps, start=0) -> None:
    file = MetricsFile(path, start)
    for step in steps:
        file.write(row(step))
    file.close()


def test_a_step_has_the_promised_keys_and_numbers():
    result = StepResult(2.5, 0.7, 4096, metrics={"z_loss": 0.01})
    values = step_values(7, result, lr=1e-3, seconds=2.0, flops=3e12, peak=6e12, memory_gib=1.5)
    promised = [
        "step",
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "tokens_per_second",
        "step_seconds",
        "mfu",
        "memory_gib",
    ]
    assert list(values) == [*promised, "z_loss"]
    assert values["tokens_per_second"] == 2048
    assert values["mfu"] == 0.25  # 3e12 operations in 2 s, of 6e12 a second
    skipped = step_values(
        7, StepResult(2.5, 0.7, 1, skipped=True), lr=0, seconds=1, flops=1, peak=1, memory_gib=0
    )
    assert skipped["skipped"] is True


def test_lines_are_on_the_system_as_soon_as_they_are_written(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        file.write(row(step))
        assert [r["step"] for r in read_metrics(tmp_path)] == list(range(1, step + 1))


def test_resuming_cuts_what_lies_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 16))
    write(path, range(11, 21), start=10)
    assert read_metrics(path) == [row(step) for step in range(1, 21)]
    write(path, [1, 2])  # from the beginning again
    assert read_metrics(path) == [row(1), row(2)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_file_cut_at_any_byte_reads_and_resumes(tmp_path):
    """A kill or a power loss leaves a prefix: all of them, not a sample."""
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        complete = sum(end <= size for end in ends)
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3][:complete]
        write(path, [complete + 1], start=complete)
        assert read_metrics(path) == [row(step) for step in range(1, complete + 2)]


def test_an_earlier_incarnation_that_still_lives_cannot_write_into_the_new_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    old = MetricsFile(path)
    old.write(row(1))
    new = MetricsFile(path, start_step=1)
    old.write({"step": 2, "loss": -1.0})
    new.write(row(2))
    old.write({"step": 3, "loss": -1.0})
    assert read_metrics(path) == [row(1), row(2)]


def test_steps_that_appear_twice_are_kept_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in (1, 2, 2, 1, 3)))
    write(path, [4], start=3)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4]


def test_numbers_that_are_not_finite_are_valid_json(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": -math.inf, "list": [math.nan, 1.0]})

    def refuse(constant):
        raise ValueError(constant)

    # parse_constant is called for NaN and Infinity, which are not JSON.
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": None, "list": [None, 1.0]}
    (back,) = read_metrics(tmp_path)
    assert math.isnan(back["loss"])
    assert math.isnan(back["grad_norm"])


def test_tensors_and_numpy_numbers_become_plain(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(
        {"step": np.int64(1), "loss": torch.tensor(0.5), "tokens": np.int32(3), "ok": torch.tensor(True)}
    )
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5, "tokens": 3, "ok": True}]


def test_an_evaluation_joins_the_line_of_its_step(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(row(1))
    file.write(row(2))
    file.amend({"heldout_loss": 0.75})
    file.amend({"heldout_loss": 0.5, "lr": 0})  # a shorter line leaves nothing of the longer one
    file.write(row(3))
    assert read_metrics(tmp_path) == [row(1), {**row(2), "heldout_loss": 0.5, "lr": 0}, row(3)]


def test_an_evaluation_right_after_a_resume_joins_the_line_of_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    MetricsFile(path, start_step=2).amend({"heldout_loss": 0.5})
    assert read_metrics(path) == [row(1), {**row(2), "heldout_loss": 0.5}]
    fresh = MetricsFile(path)
    fresh.amend({"heldout_loss": 9.0})  # before the first step there is no line to join
    fresh.write(row(1))
    assert read_metrics(path) == [row(1)]


@pytest.mark.parametrize("taken", [0, 10, None])
def test_a_full_disk_is_an_error_without_torn_or_lost_lines(tmp_path, monkeypatch, taken):
    """Space runs out after `taken` bytes of a line, or the call fails; later there is space again."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(row(1))
    real = os.pwrite

    def full(descriptor, data, offset):
        if taken is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(descriptor, data[:taken], offset)

    monkeypatch.setattr(os, "pwrite", full)
    for act in (
        lambda: file.write(row(2)),
        lambda: file.amend({"heldout_loss": 0.5}),
        lambda: file.write(row(3)),
    ):
        with pytest.raises(OSError, match=r"No space|disk full"):
            act()
        assert read_metrics(tmp_path) == [row(1)]
    monkeypatch.setattr(os, "pwrite", real)
    file.write(row(4))
    assert read_metrics(tmp_path) == [row(1), {**row(2), "heldout_loss": 0.5}, row(3), row(4)]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{json.dumps(row(1))}\n{{broken\n{json.dumps(row(3))}\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl, line 2: is no JSON object"):
        read_metrics(path)
    assert read_metrics(tmp_path / "missing.jsonl") == []


def test_peak_memory_is_at_least_what_is_held():
    held = np.ones(2**25)  # 256 MiB, touched
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    resident = pages * resource.getpagesize() / 2**30
    assert peak_memory_gib(torch.device("cpu")) >= resident * 0.99 > 0.25  # 1%: the kernel counts lazily
    del held
