"""Jobs as users launch them: chains, sweeps, time limits, torchrun; looking after them. See also test_faults."""

from __future__ import annotations

import pytest

from headway.launch.slurm.after import newest_step
from headway.tests.launch.slurm.cluster import kill, poll
from headway.tests.launch.slurm.launched import EVERY, STEPS, Run

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def test_slurms_own_signal_comes_before_the_time_limit(desk, cluster, straight):
    """Slurm looks at limits every 30 s: the signal of the first start comes after 50 to 80 s."""
    run = desk(pace=1.6).launch("--time=2", "--signal-before=40")
    poll(lambda: "asked to stop" in run.log(), 120, lambda: f"no signal\n{run.log()}")
    run.recover("time limit: Slurm's own signal", start=2)
    run.wait_until_done(300)
    run.prove(straight)


def test_links_of_a_chain_go_on_and_the_rest_is_cancelled(desk, cluster, straight):
    run = desk(pace=0.2).launch("--chain=4")
    first, second, third, fourth = run.jobs
    for number, job in enumerate((first, second), start=1):
        run.wait_for_step(number * EVERY + 3)
        assert cluster.state(job) == "RUNNING"
        cluster.signal(job)
        run.recover(f"chain: from link {number} to the next", start=number + 1)
    cluster.wait(third, {"COMPLETED"}, timeout=120)
    cluster.wait(fourth, {"CANCELLED"}, timeout=30)
    run.prove(straight)


def test_runs_of_a_sweep_are_an_array(desk, cluster, alone):
    sweep = desk(pace=0.05).launch("--sweep=optimizer.muon_lr=0.02,0.01", nodes=1)
    for task in range(2):
        cluster.wait(f"{sweep.job}_{task}", {"COMPLETED"}, timeout=180)
    same, other = (Run(cluster, sweep.folder.with_name(f"run-{task}")) for task in range(2))
    same.prove(alone)
    assert other.losses()[0] == alone.losses()[0]
    assert other.losses()[-1] != alone.losses()[-1]


def test_a_task_of_a_sweep_is_requeued_alone(desk, cluster, alone):
    sweep = desk(pace=0.3).launch("--sweep=optimizer.muon_lr=0.02,0.01", nodes=1)
    run, other = (Run(cluster, sweep.folder.with_name(f"run-{task}")) for task in range(2))
    run.wait_for_step(EVERY + 2)
    cluster.signal(f"{sweep.job}_0")
    for task in range(2):
        cluster.wait(f"{sweep.job}_{task}", {"COMPLETED"}, timeout=240)
    assert len(run.begun()) == 2
    assert len(other.begun()) == 1
    run.prove(alone)


def test_status_logs_and_cancel(desk, cluster, straight):
    place = desk(pace=1.5)  # slow enough to be met under way by four commands
    run = place.launch()
    run.wait_for_step(EVERY + 2)
    said = place.headway("launch", "status", "runs/run")
    assert run.job in said
    assert "RUNNING" in said
    assert f"of {STEPS}" in said
    assert "start 1" in place.headway("launch", "logs", "runs/run")
    assert "will save first" in place.headway("launch", "cancel", "runs/run")
    cluster.wait(run.job, {"COMPLETED", "FAILED", "CANCELLED"}, timeout=60)
    assert newest_step(run.folder) == run.step() < STEPS
    assert "the run was cancelled" in place.headway("launch", "logs", "runs/run")
    assert cluster.restarts(run.job) == 0
    again = desk(pace=0).launch()
    again.wait_until_done()
    assert len(run.begun()) == 2
    again.prove(straight)
    assert "COMPLETED" in place.headway("launch", "status", "runs/run")


def test_a_wrong_job_is_not_started_again(desk, cluster):
    run = desk().launch("--data=missing.jsonl")
    cluster.wait(run.job, {"FAILED"}, timeout=60)
    assert cluster.describe(run.job)["ExitCode"] == "2:0"
    assert "missing.jsonl" in run.log()
    assert cluster.restarts(run.job) == 0


def test_torchruns_agents_start_ranks_save_and_bear_a_fault(desk, cluster, straight):
    run = desk(pace=0.4).launch("--launcher=torchrun")
    run.wait_for_step(EVERY + 2)
    cluster.run("scancel", "--signal=USR1", "--batch", run.job)  # as Slurm does for `--signal=B:USR1@...`
    saved = run.recover("torchrun: asked to save", start=2)
    assert saved.steps == 0
    run.wait_for_step(2 * EVERY + 5)
    kill([max(cluster.ranks("node2"))])  # the agent is older than its rank
    run.recover("torchrun: a rank killed", start=3)
    run.wait_until_done()
    run.prove(straight)
