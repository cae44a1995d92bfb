"""The virtual cluster itself: that it is one, loses nodes as a cluster does, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from headway.tests.launch.slurm.cluster import Cluster, poll

pytestmark = pytest.mark.slurm

SLEEP = "#!/bin/bash\nsrun sleep 300\n"


def test_a_job_of_two_nodes_runs_and_its_output_is_read(cluster):
    line = "echo task \\$SLURM_PROCID on \\$SLURMD_NODENAME gpus \\$CUDA_VISIBLE_DEVICES"
    job = cluster.submit(f'#!/bin/bash\nsrun bash -c "{line}"\n', "--nodes=2", "--gpus-per-node=2")
    cluster.wait(job, {"COMPLETED"}, timeout=30)
    said = sorted(cluster.job_log(job).splitlines())
    assert said == ["task 0 on node1 gpus 0,1", "task 1 on node2 gpus 0,1"]


def test_a_lost_node_requeues_the_job_on_a_spare(cluster):
    job = cluster.submit(SLEEP, "--nodes=2", "--exclusive")
    cluster.wait(job, {"RUNNING"}, timeout=30)
    poll(lambda: len(cluster.processes("node2")) >= 2, 10, lambda: "no step on node2")
    cluster.kill_node("node2")
    assert cluster.processes("node2") == []
    cluster.wait_for_restart(job, times=1, timeout=90)
    assert cluster.hosts(job) == ["node1", "node3"]


def test_what_runs_on_a_node_that_was_cut_off_runs_on(cluster):
    job = cluster.submit(SLEEP, "--nodes=1", "--nodelist=node3")
    cluster.wait(job, {"RUNNING"}, timeout=30)
    poll(lambda: len(cluster.processes("node3")) >= 2, 10, lambda: "no step on node3")
    cluster.cut_off("node3")
    assert len(cluster.processes("node3")) >= 2


def test_two_clusters_run_beside_each_other_and_leave_nothing(cluster):
    with Cluster(nodes=1) as other:
        job = other.submit(SLEEP)
        other.wait(job, {"RUNNING"}, timeout=30)
        assert "sleep 300" not in cluster.run("squeue", "--noheader")
        started = other._processes()
        assert started
    assert not other.folder.exists()
    assert not [pid for pid in started if running(pid)]


def running(pid: int) -> bool:
    """Whether a process is there and no zombie (whoever inherits an orphan may not collect it)."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
