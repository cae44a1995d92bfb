"""Nodes that fail: the first one, one without a spare, one that is dead for Slurm alone, one that fails again and
again. See test_faults, which is always run."""

from __future__ import annotations

import pytest

from headway.tests.launch.slurm.cluster import kill, poll
from headway.tests.launch.slurm.launched import EVERY

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def test_without_a_spare_it_waits_until_the_node_is_back(desk, cluster, straight):
    run = desk().launch("--exclude=node3")
    run.wait_for_step(EVERY + 5)
    cluster.kill_node("node2")
    cluster.wait(run.job, {"PENDING"}, timeout=90)
    cluster.revive("node2")
    run.recover("a node lost, gone on when it was back", start=2)
    assert cluster.hosts(run.job) == ["node1", "node2"]
    run.wait_until_done()
    run.prove(straight)


def test_the_node_of_the_batch_script_may_be_lost_too(desk, cluster, straight):
    run = desk().launch()
    run.wait_for_step(EVERY + 5)
    cluster.kill_node("node1")
    run.recover("the first node lost, gone on with a spare", start=2)
    run.wait_until_done()
    assert cluster.restarts(run.job) == 1
    run.prove(straight)


def test_a_node_that_is_dead_for_slurm_alone_does_no_harm(desk, cluster, alone):
    """Its rank runs on and saves, until it finds that its successor has taken over; then its script ends, and must not
    requeue the job, which runs elsewhere."""
    run = desk(pace=1.2).launch(nodes=1)
    run.wait_for_step(EVERY + 5)
    [node] = cluster.hosts(run.job)
    cluster.cut_off(node)
    run.recover("a node dead for Slurm alone, its rank runs on", start=2)
    assert cluster.hosts(run.job) != [node]
    poll(lambda: not cluster.processes(node), 60, lambda: f"its processes run on\n{run.log()}")
    assert "another start of this run" in run.log()
    run.wait_until_done()
    assert cluster.restarts(run.job) == 1
    assert not run.faults()
    run.prove(alone)


def test_the_first_of_two_nodes_that_is_dead_for_slurm_alone_does_no_harm(desk, cluster, straight):
    """Slurm ends the other rank, its own rank fails for that; its script must leave the job to Slurm."""
    run = desk(pace=0.8).launch()
    run.wait_for_step(EVERY + 5)
    cluster.cut_off("node1")
    run.recover("the first of two nodes dead for Slurm alone", start=2)
    assert "node1" not in cluster.hosts(run.job)
    poll(lambda: not cluster.processes("node1"), 60, lambda: f"its processes run on\n{run.log()}")
    run.wait_until_done()
    assert cluster.restarts(run.job) == 1
    run.prove(straight)


def test_a_node_with_repeated_faults_is_left_out(desk, cluster, straight):
    run = desk(pace=0.3).launch("--exclude-after=2")
    for step in (EVERY + 3, 2 * EVERY + 3):
        run.wait_for_step(step)
        assert "node2" in cluster.hosts(run.jobs[-1])
        kill(cluster.ranks("node2"))
        run.recover("a rank killed", start=len(run.begun()) + 1)
    assert [fault["nodes"] for fault in run.faults()] == [["node2"], ["node2"]]
    assert len(run.jobs) == 2
    assert cluster.hosts(run.jobs[1]) == ["node1", "node3"]
    run.wait_until_done()
    run.prove(straight)


def test_faults_without_a_checkpoint_between_are_given_up(desk, cluster):
    run = desk(pace=0.5).launch("--max-faults=1", "--exclude-after=0")
    for start in (1, 2):
        poll(lambda: len(run.begun()) == start and run.step() > 1, 120, run.log)  # noqa: B023 - it is called here
        kill(cluster.ranks("node2"))
    cluster.wait(run.job, {"FAILED"}, timeout=60)
    assert [fault["step"] for fault in run.faults()] == [0, 0]
    assert "2 faults in a row without a new checkpoint" in run.log()
