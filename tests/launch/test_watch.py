"""`headway watch` beside runs that go on, stop and die."""

import os
import pty
import signal
import socket
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from headway.launch.cli import app
from headway.pretrain.errors import JobError
from headway.pretrain.records.records import read_events

HEADWAY = [sys.executable, "-P", "-c", "from headway.launch.cli import main; main()"]


def watch(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["watch", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def start(small_job, tmp_path):
    """Start the small job in a process, for many steps; returns it once it has finished one."""
    children = []

    def begin(*more: str) -> subprocess.Popen:
        sets = [f"run.dir={tmp_path}", "run.name=run", "train.steps=100000", "schedule.steps=100000", *more]
        options = [word for item in sets for word in ("--set", item)]
        child = subprocess.Popen(
            [*HEADWAY, "train", str(small_job), *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        children.append(child)
        assert child.stdout
        assert any(line.startswith("step ") for line in child.stdout)
        return child

    yield begin
    for child in children:
        child.kill()
        child.wait()
        child.stdout.close()


@pytest.mark.matrix
def test_a_run_is_seen_running_stopped_and_killed(start, tmp_path):
    child = start()
    text = watch("--once", tmp_path / "run")
    assert "running" in text
    assert f"1 rank on {socket.gethostname()}"[:20] in text
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 75
    assert "stopped" in watch("--once", tmp_path / "run")
    child = start()
    assert "running" in watch(tmp_path)  # the folder of runs; no terminal: once
    child.kill()
    child.wait()
    text = watch(tmp_path / "run")
    assert "killed" in text
    assert "went on from step" in text
    (begun, resumed) = (e for e in read_events(tmp_path / "run") if e["kind"] in ("start", "resume"))
    assert begun["world"] == 1
    assert begun["hosts"] == {socket.gethostname(): [0]}
    assert begun["layout"] == {}
    assert begun["parameters"] > 1000
    assert resumed["process"]["pid"] == child.pid != begun["process"]["pid"]


def test_ctrl_c_ends_it_quietly_and_leaves_the_last_picture(tmp_path):
    (tmp_path / "job.yaml").write_text("run: {name: x}\n")
    ours, theirs = pty.openpty()
    command = [*HEADWAY, "watch", str(tmp_path), "--interval", "0.1"]
    child = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    seen = b""
    while seen.count(b"starting") < 3:  # it looks again and again
        seen += os.read(ours, 65536)
    child.send_signal(signal.SIGINT)
    rest = b""
    try:
        while chunk := os.read(ours, 65536):
            rest += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0
    assert b"Traceback" not in rest
    assert b"\x1b[?1049l" in rest  # back from the screen of its own
    assert b"starting" in rest.partition(b"\x1b[?1049l")[2]


def test_a_terminal_is_left_when_the_run_is_over(tmp_path):
    (tmp_path / "events.jsonl").write_text('{"kind": "end", "status": "done", "time": 0, "step": 3}\n')
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [*HEADWAY, "watch", str(tmp_path)], stdout=theirs, env={**os.environ, "TERM": "xterm"}
    )
    os.close(theirs)
    assert child.wait() == 0
    assert b"done" in os.read(ours, 65536)
    os.close(ours)


def test_what_is_not_there(tmp_path, monkeypatch):
    assert "holds no records yet" in " ".join(watch(tmp_path).split())  # lines are wrapped
    (tmp_path / "gpt-tiny").mkdir()
    with pytest.raises(JobError, match=r"gpt-tinny.*is no folder.*gpt-tiny\."):
        watch(tmp_path / "gpt-tinny")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(JobError, match="run = 'runs'"):
        watch()


def test_a_picture_is_written(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(f'{{"step": {i}, "loss": {9 / i}}}\n' for i in range(1, 50)))
    out = tmp_path / "watch.svg"
    assert str(out) in watch(run, "--svg", out).replace("\n", "")
    assert out.read_text().startswith("<svg")
    assert "url(" not in out.read_text().replace("url(#", "")  # it needs no network


def test_it_loads_nothing_heavy():
    program = "import sys, headway.launch.watch; print([m for m in ('torch', 'pydantic', 'wandb') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
