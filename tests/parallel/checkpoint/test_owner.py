"""Who owns a folder of checkpoints: the start that came last, unless the scheduler says that it is the older one."""

import json

import pytest

from headway.parallel.checkpoint.owner import Owner, Start
from headway.pretrain.errors import CheckpointError, FencedError


def owner(folder, token, job="", count=0):
    return Owner(folder, token, Start(job, count))


@pytest.mark.parametrize(
    "later",
    [
        Start("slurm 8", 0),  # submitted again: its restarts are counted anew
        Start("", 0),  # by hand
        Start("slurm 7", 3),  # requeued once more
        Start("slurm 7", 2),  # a second step of the same job, after the first one failed
    ],
)
def test_a_later_start_takes_over_from_a_job_that_was_requeued_twice(tmp_path, later):
    first = owner(tmp_path, 1, "slurm 7", 2)
    first.take()
    second = Owner(tmp_path, 2, later)
    second.take()
    second.check()
    with pytest.raises(FencedError, match="another start of this run owns the folder"):
        first.check()


def test_an_earlier_start_of_the_same_job_never_takes_over(tmp_path):
    new = owner(tmp_path, 1, "slurm 7", 2)
    new.take()
    with pytest.raises(CheckpointError, match=r"restart 2 of slurm 7.*this one is restart 1 of slurm 7"):
        owner(tmp_path, 2, "slurm 7", 1).take()
    new.check()


def test_what_an_older_version_or_a_torn_write_left_is_taken_over(tmp_path):
    for left in ('{"incarnation": 5, "token": "aa"}', "{", "[]"):
        (tmp_path / "owner.json").write_text(left)
        owner(tmp_path, 1).take()
        assert json.loads((tmp_path / "owner.json").read_text())["token"] == f"{1:016x}"
