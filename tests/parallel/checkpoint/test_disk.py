"""A disk that is full, out of inodes or read-only: training goes on, the last good checkpoint stays.

The faults are real: small file systems, mounted in a mount namespace of a child process, which is this file.
"""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from headway.parallel.checkpoint import save
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.retention import latest
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import verify
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError

NAMESPACE = ["unshare", "--mount"]
MIB = 1 << 20


def mount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", str(folder)], check=True)


def remount(folder: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(folder)], check=True)


def state(mib: int, value: float) -> State:
    return State({"w": torch.full((mib * MIB // 4,), float(value))})


def attempt(checkpointer: Checkpointer, step: int, mib: int) -> dict:
    """One save, and what is there afterwards."""
    folder = checkpointer.folder.path
    checkpointer.save(step, state(mib, step))
    good = checkpointer.wait()
    newest, fresh = latest(folder), state(2, 0)
    load(newest, fresh)
    return {
        "good": good,
        "problems": [str(checkpointer.problems.pop()) for _ in list(checkpointer.problems)],
        "latest": newest.name,
        "value": fresh.tensors["w"][-1].item(),
        "whole": verify(newest) == [],
        "entries": sorted(p.name for p in folder.iterdir()),
    }


def script(base: Path) -> dict:
    """Faults of an 8 MiB disk in turn, each followed by a save that works."""
    folder = base / "checkpoints"
    folder.mkdir()
    mount(folder, "size=8m")
    found = {}
    with Checkpointer(folder, keep_last=1) as checkpointer:
        found["first"] = attempt(checkpointer, 1, 2)
        found["full"] = attempt(checkpointer, 2, 7)
        found["again"] = attempt(checkpointer, 3, 2)
        remount(folder, "ro")
        found["read-only"] = attempt(checkpointer, 4, 2)
        remount(folder, "rw")
        found["writable"] = attempt(checkpointer, 5, 2)
        filler = folder / "filler"
        for step, spare in ((6, 1), (7, 2)):  # pages beside the data: for the header, and for one small file
            free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
            filler.write_bytes(bytes(free - 2 * MIB - spare * 4096))
            found[f"{spare} to spare"] = attempt(checkpointer, step, 2)
            filler.unlink()
        found["room"] = attempt(checkpointer, 8, 2)
    small = base / "inodes"
    small.mkdir()
    mount(small, "nr_inodes=9")
    with Checkpointer(small, keep_last=5) as checkpointer:
        found["inodes first"] = attempt(checkpointer, 1, 2)
        found["inodes"] = attempt(checkpointer, 2, 2)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    if shutil.which("unshare") is None:
        pytest.skip("NOT TESTED: full and read-only disks. `unshare` (util-linux) is not installed.")
    trial = subprocess.run(
        [*NAMESPACE, "mount", "-t", "tmpfs", "none", str(folder)], capture_output=True, text=True, check=False
    )
    if trial.returncode:
        pytest.skip(f"NOT TESTED: full and read-only disks. Mounting is not permitted here: {trial.stderr}")
    run = subprocess.run(
        [*NAMESPACE, sys.executable, "-P", __file__, str(folder)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


FAULTS = {
    "full": (2, "No space left on device", "step_00000001", "It takes 7,340,032 bytes; "),
    "read-only": (4, "Read-only file system", "step_00000003", "bytes are free"),
    "1 to spare": (6, "No space left on device", "step_00000005", "bytes are free"),
    "2 to spare": (7, "No space left on device", "step_00000005", "bytes are free"),
    "inodes": (2, "No space left on device", "step_00000001", "bytes are free"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_and_the_last_good_checkpoint_stays(found, fault):
    step, reason, last, room = FAULTS[fault]
    after = found[fault]
    (problem,) = after["problems"]
    assert not after["good"]
    assert problem.startswith(f"step {step} was not saved: /")
    for text in (reason, room, "The last good checkpoint is /", f"/{last}. The next save tries again."):
        assert text in problem
    assert after["latest"] == last
    assert after["whole"]
    assert after["value"] == int(last[-1])
    assert set(after["entries"]) - {"filler"} == {"LATEST", "owner.json", last}, "staging is removed"


@pytest.mark.parametrize(("case", "step"), [("first", 1), ("again", 3), ("writable", 5), ("room", 8)])
def test_the_next_save_works(found, case, step):
    after = found[case]
    assert after["good"]
    assert after["problems"] == []
    assert after["latest"] == f"step_{step:08d}"
    assert after["value"] == step
    assert after["whole"]
    assert after["entries"] == ["LATEST", "owner.json", f"step_{step:08d}"]


def test_a_folder_that_cannot_be_made_stops_the_start(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="cannot be made ready for checkpoints: Not a directory"):
        Checkpointer(tmp_path / "file" / "checkpoints")


def test_any_error_of_the_writer_surfaces(tmp_path, monkeypatch):
    """Also one that is nobody's idea of a disk fault, and in the thread."""

    def broken(*_):
        raise ZeroDivisionError("surprise")

    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1, 1))
        assert checkpointer.wait()
        monkeypatch.setattr(save, "write_shard", broken)
        checkpointer.save(2, state(1, 2))
        assert not checkpointer.wait()
    assert "step 2 was not saved: surprise" in str(checkpointer.problems[0])
    assert isinstance(checkpointer.problems[0].__cause__, ZeroDivisionError)
    assert latest(tmp_path).name == "step_00000001"


def test_any_sync_that_fails(tmp_path, monkeypatch):
    """EIO from each fsync in turn: what LATEST names stays whole, and the next save works."""
    real, left = os.fsync, 0

    def fsync(handle):
        nonlocal left
        left -= 1
        if left == 0:
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with Checkpointer(tmp_path, background=False, keep_last=1) as checkpointer:
        step, nth = 1, 0
        while True:
            checkpointer.save(step, state(1, step))
            assert checkpointer.problems == []
            assert latest(tmp_path).name == f"step_{step:08d}"
            nth, step = nth + 1, step + 1
            left = nth
            checkpointer.save(step, state(1, step))
            if not checkpointer.problems:
                break  # a save has fewer syncs than this
            assert "Input/output error" in str(checkpointer.problems.pop())
            assert verify(latest(tmp_path)) == []
            step, left = step + 1, 0
    # shard, manifest, staging folder, LATEST, its folder before and after the last rename
    assert nth - 1 == 6


def test_the_folder_is_removed_while_the_run_goes_on(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(1, state(1, 1))
        assert checkpointer.wait()
        shutil.rmtree(tmp_path / "checkpoints")
        checkpointer.save(2, state(1, 2))
        assert checkpointer.wait()
    assert verify(latest(tmp_path / "checkpoints")) == []


def test_no_memory_for_the_copy(tmp_path, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state(1, 1))

        def broken(*_):
            raise RuntimeError("out of host memory")

        monkeypatch.setattr(checkpointer._buffer, "fill", broken)
        checkpointer.save(2, state(1, 2))
        assert not checkpointer.wait()
    assert "out of host memory" in str(checkpointer.problems[0])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "owner.json", "step_00000001"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(script(Path(sys.argv[1]))))
