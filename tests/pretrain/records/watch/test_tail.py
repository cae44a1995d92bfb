"""A file that grows, is amended and is replaced, read beside its writer: as `read_metrics` reads it whole."""

import os
import random

from headway.pretrain.records.metrics import MetricsFile, read_metrics
from headway.pretrain.records.watch.run import Curves
from headway.pretrain.records.watch.tail import Tail


def row(step: int) -> dict:
    return {"step": step, "loss": 1 / step}


def test_only_what_is_new_is_given(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == (False, [])
    file = MetricsFile(path)
    file.write(row(1))
    file.write(row(2))
    assert tail.read() == (False, [row(1), row(2)])
    assert tail.read() == (False, [])
    file.amend({"heldout_loss": 0.5})
    assert tail.read() == (False, [{**row(2), "heldout_loss": 0.5}])
    file.write(row(3))
    assert tail.read() == (False, [row(3)])


def test_a_resumed_run_begins_another_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first, tail = MetricsFile(path), Tail(path)
    for step in (1, 2, 3, 4):
        first.write(row(step))
    tail.read()
    second = MetricsFile(path, start_step=2)
    second.write(row(3))
    first.write(row(5))  # of a process that does not know yet that it is over
    assert tail.read() == (True, [row(1), row(2), row(3)])


def test_torn_and_broken_lines(tmp_path):
    path, tail = tmp_path / "events.jsonl", Tail(tmp_path / "events.jsonl")
    path.write_bytes(b'{"step": 1}\n{"step"')
    assert tail.read() == (False, [{"step": 1}])
    with open(path, "ab") as file:
        file.write(b": 2}\n\xff\xfe\n")
    assert tail.read() == (False, [{"step": 2}])
    assert tail.read() == (False, [])
    with open(path, "ab") as file:
        file.write(b'[1]\n{"step": 3}\n')
    assert tail.read() == (False, [{"step": 3}])
    assert tail.read() == (False, [])
    path.unlink()
    assert tail.read() == (True, [])
    assert tail.read() == (False, [])


def test_any_history_ends_where_reading_the_whole_file_does(tmp_path):
    """Steps, evaluations, resumes and looks between them in any order; a look may also fall on a torn last line."""
    draw = random.Random(0)
    for life in range(20):
        folder = tmp_path / str(life)
        path = folder / "metrics.jsonl"
        file, tail, curves, step = MetricsFile(path), Tail(path), Curves(), 0
        for _ in range(60):
            act = draw.choice(["step", "step", "step", "amend", "resume", "look", "torn"])
            if act == "step":
                file.write(row(step := step + 1))
            elif act == "amend":
                file.amend({"heldout_loss": draw.random()})
            elif act == "resume":
                file.close()
                step = draw.randint(0, step)
                file = MetricsFile(path, step)
            if act == "torn":
                size = path.stat().st_size
                with open(path, "ab") as torn:
                    torn.write(b'{"step": 99, "lo')
            if act in ("look", "torn"):
                other, rows = tail.read()
                curves = Curves() if other else curves
                for each in rows:
                    curves.add(each)
                if act == "torn":
                    os.truncate(path, size)
                whole = read_metrics(folder)
                assert list(curves.steps) == [r["step"] for r in whole]
                assert list(curves.values["loss"]) == [r["loss"] for r in whole]
                expected = [r["heldout_loss"] for r in whole if "heldout_loss" in r]
                assert [v for v in curves.values["heldout_loss"] if v == v] == expected
        file.close()
