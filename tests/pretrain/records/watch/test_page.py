"""What a person sees of one run and of several, from files that real records wrote."""

import io
import json
import math
import os
import time
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from headway.pretrain.config import Job
from headway.pretrain.records.process import identify
from headway.pretrain.records.records import Records
from headway.pretrain.records.watch.page import Page
from headway.pretrain.records.watch.run import WatchedRun
from headway.pretrain.records.watch.several import Several
from headway.pretrain.records.watch.status import ago, judge

BEGAN = 1_750_000_000.0
GOLDEN = Path(__file__).with_name("golden.txt")
JOB = {
    "run": {"name": "demo"},
    "model": {"family": "gpt", "layers": 4, "hidden": 256, "heads": 4},
    "train": {"steps": 400},
    "tracking": {"wandb": "off"},
}
PLACE = {
    "launcher": "torchrun", "incarnation": 1, "world": 4, "layout": {"shard": 2, "tensor": 2},
    "hosts": {"node1": [0, 1], "node2": [2, 3]}, "device": "A chip", "precision": "bf16", "parameters": 4_197_120,
}  # fmt: skip


def step_values(step: int) -> dict:
    wave = math.sin(step * 1.7)
    return {
        "step": step, "loss": 3 + 5 * math.exp(-step / 40) + 0.03 * wave, "lr": 1e-3 * min(1, step / 40),
        "grad_norm": 1 / step + 0.5, "tokens": 4096, "tokens_per_second": 10_000 + 300 * wave,
        "step_seconds": 0.4, "mfu": 0.4 + 0.01 * wave, "memory_gib": 1.5, "joules": 20.0,
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run that was stopped at step 240, went on from 200 and stands at 252, as `Records` writes it."""
    clock = count(BEGAN)
    monkeypatch.setattr("headway.pretrain.records.records.time", SimpleNamespace(time=lambda: next(clock)))
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    job, run_dir = Job.model_validate(JOB), tmp_path / "demo"
    first = Records(run_dir, job, place={**PLACE, "incarnation": 0}, stream=io.StringIO())
    for step in range(1, 241):
        first.step(step_values(step))
        if step % 100 == 0:
            checkpoint = run_dir / "checkpoints" / f"step_{step:08d}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "shard").write_bytes(bytes(2**21))
            first.event("checkpoint", step=step, path=checkpoint)
            first.event("eval", heldout_loss=3.1 + 5 * math.exp(-step / 40))
    first.event("warning", message="disk is slow \x1b[31m")
    first.close("stopped")
    second = Records(run_dir, job, start_step=200, place=PLACE, stream=io.StringIO())
    for step in range(201, 253):
        second.step(step_values(step))
    (run_dir / "job.yaml").write_text(json.dumps(JOB))  # JSON is YAML
    settle(run_dir)
    return run_dir


def settle(run_dir: Path) -> None:
    """Give the files times of the story, and the process one of another machine."""
    path = run_dir / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    for event in events:
        if "process" in event:
            event["process"]["boot"] = "another"
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(run_dir / name, (BEGAN + 100, BEGAN + 100))


def seen(run_dir: Path) -> WatchedRun:
    run = WatchedRun(run_dir)
    run.refresh()
    return run


def picture(shown, width: int = 100, height: int = 24, **options) -> str:
    out = io.StringIO()
    console = Console(file=out, width=width, height=height, highlight=False, **options)
    console.print(shown, height=height)
    return out.getvalue()


def test_a_frame_looks_as_it_did(folder):
    """`UPDATE_GOLDEN=1` writes the present picture: look at it before it is kept."""
    runs = [seen(folder), *(elsewhere(folder, word) for word in ("done", "failed"))]
    frames = [picture(Page(runs[0], BEGAN + 110)), picture(Page(runs[0], BEGAN + 110), 80)]
    frames.append(picture(Several(runs, BEGAN + 110), 120))
    text = "\n".join("".join(f"{line.rstrip()}\n" for line in frame.splitlines()) for frame in frames)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def elsewhere(folder: Path, word: str) -> WatchedRun:
    """Another run, which ended."""
    other = folder.with_name(word)
    other.mkdir()
    (other / "metrics.jsonl").write_bytes((folder / "metrics.jsonl").read_bytes())
    end = {"time": BEGAN + 20, "kind": "end", "step": 252, "status": word}
    (other / "events.jsonl").write_text(json.dumps(end) + "\n")
    return seen(other)


@pytest.mark.parametrize(("width", "height"), [(80, 24), (60, 16), (100, 30), (200, 60), (40, 10), (20, 5)])
def test_a_page_fits_where_it_is_shown(folder, width, height):
    lines = picture(Page(seen(folder), BEGAN + 110), width, height).splitlines()
    assert len(lines) == height
    assert max(map(len, lines)) <= width
    lines = picture(Several([seen(folder)] * 50, BEGAN + 110), width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width


def test_the_numbers_are_those_of_the_run(folder):
    text = picture(Page(seen(folder), BEGAN + 110))
    for part in (
        "step 252/400", "63%", "0:59 left",  # 148 steps of 0.4 s
        f"{step_values(252)['loss']:.4f}", "10k", "40.0%", "1.5 GiB", "50 W", "2 MiB", "step 200",
        "GPT 4 x 256, 4.2M parameters, bf16, 4 ranks (shard 2 x tensor 2) on node1, node2: A chip",
        "went on from step 200 on node1, node2, incarnation 1", "stopped at step 240", "disk is slow",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text


def test_without_colour_and_without_unicode(folder, monkeypatch):
    page = Page(seen(folder), BEGAN + 110)
    assert "\x1b[3" in picture(page, force_terminal=True, color_system="standard")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not {"\x1b[31m", "\x1b[32m", "\x1b[36m"} & set(picture(page, force_terminal=True).split())

    class Ascii(io.StringIO):
        encoding = "ascii"

    out = Ascii()
    Console(file=out, width=100, highlight=False).print(page)
    assert out.getvalue().isascii()


def test_a_run_is_judged_by_what_it_left(folder, tmp_path):
    run = seen(folder)
    assert judge(run, BEGAN + 110).word == "running"
    stale = judge(run, BEGAN + 100 + 3600)
    assert (stale.word, stale.note) == ("stale", "no step for 60 min; usually one takes 400 ms")
    run.start["process"] = {**identify(), "pid": 2**22 + 1}
    assert judge(run, BEGAN + 110).word == "killed"
    run.start["process"] = identify()
    assert judge(run, BEGAN + 110).word == "running"
    for status in ("done", "stopped", "failed"):
        run.events.append({"kind": "end", "status": status, "time": BEGAN + 105})
        assert judge(run, BEGAN + 110) == judge(run, BEGAN + 110)
        assert judge(run, BEGAN + 110).word == status
        assert judge(run, BEGAN + 110).note == "5 s ago"
    run.events.append({"kind": "resume", "step": 252, "time": BEGAN + 106})
    assert judge(run, BEGAN + 110).word == "starting"
    assert judge(run, BEGAN + 4000).word == "stale"
    empty = tmp_path / "empty"
    empty.mkdir()
    assert judge(seen(empty), BEGAN).word == "empty"
    assert "holds no records yet" in picture(Page(seen(empty), BEGAN))
    (empty / "job.yaml").write_text("run: {name: x}\n")
    assert judge(seen(empty), BEGAN).word == "starting"
    assert "no loss yet" in picture(Page(seen(empty), BEGAN))


def test_a_run_is_followed_through_a_resume(folder):
    run = seen(folder)
    records = Records(folder, Job.model_validate(JOB), start_step=100, stream=io.StringIO())
    run.refresh()
    assert list(run.curves.steps) == list(range(1, 101))
    records.step(step_values(101))
    records.event("eval", heldout_loss=2.0)
    records.close("done")
    run.refresh()
    assert run.curves.last("heldout_loss") == (101, 2.0)
    assert run.curves.steps[-1] == 101
    assert [e["kind"] for e in run.events][-3:] == ["resume", "eval", "end"]


def test_files_of_any_kind_are_borne(tmp_path):
    (tmp_path / "job.yaml").write_text("- [\n")
    (tmp_path / "metrics.jsonl").write_text(
        '{"step": 1, "loss": null}\n{"step": 2, "loss": "x", "lr": true}\n'
    )
    (tmp_path / "events.jsonl").write_text('{"kind": "start", "hosts": ["a"], "world": "2"}\n{"no": 1}\n')
    text = picture(Page(seen(tmp_path), BEGAN))
    assert "step 2/?" in text
    picture(Several([seen(tmp_path)], BEGAN))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (5.9, "5 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (172_800, "2 d")],
)
def test_ages_are_told_as_people_do(seconds, text):
    assert ago(seconds) == text
