"""SIGKILL at any moment of a save: what LATEST names always loads, and the next start goes on.

This file is also the script that does the killing: it forks its victims, so that each costs milliseconds.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.retention import latest, list_checkpoints, step_of
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import verify
from headway.pretrain.engine import State

RANDOM_KILLS = 25
AUDITED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir"}


def state(step: int, size: int) -> State:
    return State({"w": torch.full((size,), float(step)), "b": torch.full((3,), -float(step))}, {"step": step})


def check(folder: Path, reached: int, size: int) -> None:
    """Every public checkpoint is whole, and LATEST names one as new as the last that was reported."""
    for path in list_checkpoints(folder):
        assert verify(path) == [], path
    newest = latest(folder)
    if (folder / "LATEST").exists():
        assert newest
        assert newest.name == (folder / "LATEST").read_text().strip()
    if reached:
        assert newest
        assert step_of(newest.name) >= reached
    if newest:
        fresh = state(0, size)
        step = load(newest, fresh)["step"]
        assert step == step_of(newest.name)
        assert all(torch.equal(fresh.tensors[k], v) for k, v in state(step, size).tensors.items())


def die_at(count: int) -> None:
    """Kill this process right before its `count`-th call that changes or reads the file system."""
    left = count

    def tick(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(lambda event, _: tick() if event in AUDITED else None)
    fsync = os.fsync
    os.fsync = lambda handle: (tick(), fsync(handle))[1]


def victim(folder: Path, steps: list[int], size: int, pipe: int, at: int = 0) -> None:
    """Save one step after the other, and report each that has been published."""
    try:
        if at:
            die_at(at)
        with Checkpointer(folder, keep_last=1, background=not at) as checkpointer:
            for step in steps:
                checkpointer.save(step, state(step, size))
                if not at:
                    os.write(pipe, b"%d\n" % (step - 1))  # save returned: the one before it is published
                if checkpointer.problems:
                    os.write(pipe, f"problem: {checkpointer.problems[0]}\n".encode())
                if at and checkpointer.published:
                    os.write(pipe, b"%d\n" % step)
    finally:
        os._exit(0)


def fork(
    folder: Path, steps: list[int], size: int, at: int = 0, delay: float | None = None
) -> tuple[bool, int]:
    """Run a victim until it is killed or done; returns whether it was killed and what it reported last."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reading)
        victim(folder, steps, size, writing, at)
    os.close(writing)
    if delay is not None:
        first = os.read(reading, 100)  # it has begun
        time.sleep(delay)  # a random moment is what is wanted here
        os.kill(child, signal.SIGKILL)
    else:
        first = b""
    with open(reading, "rb") as pipe:
        lines = (first + pipe.read()).decode().split("\n")
    assert not any("problem" in line for line in lines), lines
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    return killed, max((int(line) for line in lines if line), default=0)


def every_call(base: Path) -> int:
    """Kill before the first, second... call of a run that saves, retires and replaces. Returns how many."""
    at = 0
    while True:
        at += 1
        folder = base / f"at{at}"
        killed, reached = fork(folder, [1, 2, 2], size=1000, at=at)
        check(folder, reached, 1000)
        if not killed:
            return at - 1
        with Checkpointer(folder, background=False) as checkpointer:
            checkpointer.save(9, state(9, 1000))
        assert checkpointer.problems == []
        check(folder, 9, 1000)
        assert not [p for p in folder.iterdir() if p.name.startswith((".staging", ".trash"))], at


def any_moment(folder: Path) -> int:
    """Kill at random moments, again and again in one folder. Returns the last step that survived."""
    moments, size = random.Random(0), 500_000
    for _ in range(RANDOM_KILLS):
        newest = latest(folder)
        start = step_of(newest.name) + 1 if newest else 1
        _, reached = fork(folder, list(range(start, start + 1000)), size, delay=moments.uniform(0, 0.08))
        check(folder, max(reached, start - 1), size)
    return step_of(latest(folder).name)


@pytest.fixture(scope="module")
def killed():
    """What the script found; it runs alone, because only a process without threads may fork so."""
    # In memory where there is such a disk: a SIGKILL loses no written page, so fsync would only cost time.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        command = [sys.executable, "-P", __file__, folder]
        run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_killed_before_every_file_system_call(killed):
    # Three saves, one of them a replacement, and two deletions: a drop means that the hook sees less.
    assert killed["calls"] >= 80


def test_killed_at_random_moments(killed):
    assert killed["survived"] >= 1


if __name__ == "__main__":
    base = Path(sys.argv[1])
    torch.set_num_threads(1)
    print(json.dumps({"calls": every_call(base), "survived": any_moment(base / "random")}))
