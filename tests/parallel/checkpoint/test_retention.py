"""What is kept, what goes, what is the latest, and who may publish."""

import pytest
import torch

from headway.parallel.checkpoint import retention, save
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.owner import Start
from headway.parallel.checkpoint.publish import Folder
from headway.parallel.checkpoint.retention import latest, list_checkpoints, retire, step_of
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import newest_good
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError


def state(value=0.0):
    return State({"w": torch.full((8,), float(value))})


def steps(folder):
    return [step_of(path.name) for path in list_checkpoints(folder)]


@pytest.fixture
def saver(tmp_path):
    def save(*wanted, **kwargs):
        with Checkpointer(tmp_path, background=False, **kwargs) as checkpointer:
            for step in wanted:
                checkpointer.save(step, state(step))
        assert checkpointer.problems == []

    return save


def test_newest_and_multiples_stay(tmp_path, saver):
    saver(*range(5, 65, 5), keep_last=2, keep_every=20)
    assert steps(tmp_path) == [20, 40, 55, 60]
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith("step")) == [
        "LATEST",
        "owner.json",
    ]


def test_a_run_that_went_back_keeps_both_sides(tmp_path, saver):
    saver(10, 20, 30, keep_last=3)
    saver(15, keep_last=1)  # resumed from 10: 20 and 30 belong to a future that was left
    assert steps(tmp_path) == [15, 20, 30]
    assert latest(tmp_path).name == "step_00000015"
    assert newest_good(tmp_path)[0].name == "step_00000015"
    saver(25, keep_last=1)
    assert steps(tmp_path) == [25, 30]
    saver(35, keep_last=1)
    assert steps(tmp_path) == [35]


def test_what_latest_names_is_never_deleted(tmp_path, saver):
    saver(1, 2, 3, keep_last=5)
    (tmp_path / "LATEST").write_text("step_00000001\n")
    retire(tmp_path, 3, keep_last=1, keep_every=0)
    assert steps(tmp_path) == [1, 3]


def test_nothing_goes_when_the_new_one_is_not_whole(tmp_path, saver, monkeypatch):
    saver(1)
    real = Folder.publish

    def torn(self, staging, manifest):
        (staging / "shard_00000.safetensors").write_bytes(b"short")
        return real(self, staging, manifest)

    monkeypatch.setattr(Folder, "publish", torn)
    with Checkpointer(tmp_path, background=False, keep_last=1) as checkpointer:
        checkpointer.save(2, state())
    assert "shard_00000.safetensors: has 5 bytes after writing" in str(checkpointer.problems[0])
    assert steps(tmp_path) == [1]
    assert latest(tmp_path).name == "step_00000001"


def test_a_deletion_that_fails_is_a_problem_but_no_failed_save(tmp_path, saver, monkeypatch):
    saver(1)

    def stuck(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(retention, "discard", stuck)
    with Checkpointer(tmp_path, keep_last=1) as checkpointer:
        checkpointer.save(2, state())
        assert checkpointer.wait()
    assert "cannot let an old checkpoint go: Operation not permitted" in str(checkpointer.problems[0])
    assert steps(tmp_path) == [1, 2]


def test_latest_falls_back(tmp_path, saver):
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    saver(1, 2)
    newest = tmp_path / "step_00000002"
    for text in ("step_00000001", "step_00000001\n"):
        (tmp_path / "LATEST").write_text(text)
        assert latest(tmp_path) == tmp_path / "step_00000001"
    for text in ("step_00000009\n", "../../etc", "", "\0", "x" * 10_000, "."):
        (tmp_path / "LATEST").write_text(text)
        assert latest(tmp_path) == newest
    (tmp_path / "LATEST").write_bytes(b"\xff\xfe")
    assert latest(tmp_path) == newest
    (tmp_path / "LATEST").unlink()
    assert latest(tmp_path) == newest


def test_only_complete_folders_are_checkpoints(tmp_path, saver):
    saver(1)
    (tmp_path / "step_00000002").mkdir()
    for name in (
        "step_3",
        "step_00000003x",
        ".staging-step_00000003-0-1",
        ".trash-step_00000003",
        "step_00000٣٣٣",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text("{}")
    assert steps(tmp_path) == [1]


def test_leftovers_are_cleaned_at_start(tmp_path, saver):
    saver(1)
    for name in (".staging-step_00000002-00000000deadbeef-1", ".trash-step_00000001-abcd"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard_00000.safetensors").write_bytes(b"half")
    saver()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "owner.json", "step_00000001"]


def test_a_predecessor_that_still_runs_is_fenced_off(tmp_path):
    old = Checkpointer(tmp_path, background=False, start=Start("job", 0))
    old.save(1, state(1))
    assert old.fenced() is None
    new = Checkpointer(tmp_path, background=False, start=Start("job", 1))
    new.save(2, state(2))
    old.save(3, state(3))
    assert "another start of this run owns the folder (restart 1 of job" in str(old.problems[0])
    assert steps(tmp_path) == [1, 2]
    assert latest(tmp_path).name == "step_00000002"
    assert "restart 1 of job" in str(old.fenced())
    assert new.fenced() is None
    with pytest.raises(CheckpointError, match="restart 1 of job"):
        Checkpointer(tmp_path, start=Start("job", 0))
    old.close()
    new.close()


def test_taken_over_while_writing(tmp_path, monkeypatch):
    """The token is looked at again right before the new name appears."""
    real = save.write_shard

    def slow(*args):
        written = real(*args)
        (tmp_path / "owner.json").write_text('{"job": "j", "count": 2, "token": "another"}')
        return written

    with Checkpointer(tmp_path, background=False) as checkpointer:
        checkpointer.save(1, state())
        monkeypatch.setattr(save, "write_shard", slow)
        checkpointer.save(2, state())
    assert "owns the folder (restart 2 of j, on host None, token another" in str(checkpointer.problems[0])
    assert steps(tmp_path) == [1]


def test_a_second_start_by_hand_takes_over(tmp_path):
    first = Checkpointer(tmp_path, background=False)
    second = Checkpointer(tmp_path, background=False)
    first.save(1, state(1))
    second.save(2, state(2))
    assert len(first.problems) == 1
    assert steps(tmp_path) == [2]
    fresh = state()
    load(tmp_path / "step_00000002", fresh)
    assert fresh.tensors["w"][0] == 2
    first.close()
    second.close()
