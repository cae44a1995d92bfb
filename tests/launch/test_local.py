"""`headway train --nproc 2`: what becomes of the ranks, and of the exit code, when something is ended from outside."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from headway.launch.local import told
from headway.parallel.checkpoint.retention import latest
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.test_train import command

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("codes", "exit_code", "message"),
    [
        ({0: 75, 1: 75}, 75, "all ranks saved and stopped"),
        ({3: 2}, 2, f"rank 3 on host {HOST} ended with exit code 2; its message stands above"),
        ({0: 70, 1: -9}, 70, f"rank 1 on host {HOST} was killed by SIGKILL (often: out of memory"),
        ({1: -6}, 70, "killed by SIGABRT (NCCL's watchdog"),
        ({1: -11}, 70, "killed by SIGSEGV"),
    ],
)
def test_what_the_ends_of_ranks_mean(codes, exit_code, message):
    failures = {rank: ProcessFailure(rank, 1, code, "") for rank, code in codes.items()}
    error = told(ChildFailedError("headway", failures))
    assert error.exit_code == exit_code
    assert message in str(error)


class Started:
    """Two ranks at work and their agent."""

    def __init__(self, small_job, folder):
        self.folder, self.said = folder / "run", folder / "said"
        sets = "train.steps=100000", "checkpoint.every=0", "parallel.replicate=2", "parallel.timeout=30"
        options = [part for each in sets for part in ("--set", each)]
        with open(self.said, "wb") as file:
            self.agent = subprocess.Popen(
                command(small_job, folder, "--nproc", "2", *options), stdout=file, stderr=file
            )
        while len(read_metrics(self.folder / "metrics.jsonl")) < 2:
            assert self.agent.poll() is None, self.said.read_text()
            time.sleep(0.05)
        children = Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text()
        self.ranks = {
            rank_of(int(pid)): int(pid) for pid in children.split() if rank_of(int(pid)) is not None
        }
        assert self.ranks.keys() == {0, 1}

    def ended(self):
        """Return when neither rank runs any more."""
        while any(alive(pid) for pid in self.ranks.values()):
            time.sleep(0.05)


def rank_of(pid):
    variables = dict(
        entry.split(b"=", 1)
        for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if b"=" in entry
    )
    return int(variables[b"RANK"]) if b"RANK" in variables else None


def alive(pid):
    """Whether a process runs; one that has ended and that nobody waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


@pytest.fixture
def started(small_job, tmp_path):
    if sys.platform != "linux":
        pytest.skip("NOT TESTED: needs /proc")
    two = Started(small_job, tmp_path)
    yield two
    for pid in (two.agent.pid, *two.ranks.values()):
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    two.agent.wait()


@pytest.mark.slow
@pytest.mark.matrix
def test_a_signal_to_the_agent_reaches_all_ranks_which_save(started):
    started.agent.send_signal(signal.SIGTERM)
    assert started.agent.wait(60) == 75, started.said.read_text()
    assert latest(started.folder / "checkpoints") is not None
    started.ended()


@pytest.mark.matrix
def test_a_rank_that_is_killed_is_named(started):
    os.kill(started.ranks[1], signal.SIGKILL)
    assert started.agent.wait(60) == 70
    assert (
        f"headway: rank 1 on host {HOST} was killed by SIGKILL (often: out of memory"
        in started.said.read_text()
    )
    started.ended()


@pytest.mark.matrix
def test_ranks_do_not_outlive_their_agent(started):
    started.agent.kill()
    started.agent.wait()
    started.ended()
    assert latest(started.folder / "checkpoints") is not None  # they saved before they went
