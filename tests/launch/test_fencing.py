"""A process of a run that another start has taken over, as one on a node that was declared dead, leaves no trace."""

import subprocess
import time

import pytest

from headway.launch import run
from headway.launch.environment import this_start
from headway.launch.ledger import show
from headway.parallel.checkpoint.owner import Start
from headway.pretrain.records.metrics import read_metrics
from headway.pretrain.records.records import read_events
from headway.tests.launch.test_train import command


def test_a_start_is_counted_within_its_job():
    assert this_start({}) == this_start({"TORCHELASTIC_RESTART_COUNT": "3"}) == Start()
    first = {"SLURM_JOB_ID": "7", "SLURM_CLUSTER_NAME": "alps"}
    assert this_start(first) == Start("Slurm's job 7 of alps", 0)
    assert this_start(first).before(this_start(first | {"SLURM_RESTART_COUNT": "2"}))
    assert not this_start(first).before(this_start({"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "2"}))


def wait_for_step(child, folder, step):
    """Return when the records have a step."""
    while len(read_metrics(folder / "metrics.jsonl")) < step:
        assert child.poll() is None
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.matrix
def test_the_earlier_process_ends_and_the_records_are_the_later_ones(small_job, tmp_path):
    longer = "--set", "train.steps=100000", "--set", "checkpoint.every=0"
    with open(tmp_path / "said", "w") as said:
        child = subprocess.Popen(command(small_job, tmp_path, *longer), stdout=said, stderr=said)
    try:
        wait_for_step(child, tmp_path / "run", 2)
        run.train([str(small_job)], [f"run.dir={tmp_path}", "run.name=run"])
        assert child.wait(60) == 70
    finally:
        child.kill()
    assert "another start of this run owns the folder (a start by hand" in (tmp_path / "said").read_text()
    folder = tmp_path / "run"
    assert [row["step"] for row in read_metrics(folder)] == list(range(1, 21))
    kinds = [event["kind"] for event in read_events(folder)]
    assert kinds.count("start") == 2
    assert "warning" not in kinds
    assert kinds.count("end") == 1  # the later one's: the earlier one leaves without a word
    show(str(folder), open_data=True)
    assert sorted(path.name for path in (folder / "checkpoints").glob("step_*"))[-1] == "step_00000020"
    run.train([str(small_job)], [f"run.dir={tmp_path}", "run.name=straight"])
    assert [row["loss"] for row in read_metrics(folder)] == [
        row["loss"] for row in read_metrics(tmp_path / "straight")
    ]
