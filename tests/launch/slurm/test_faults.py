"""Runs on the virtual cluster, with the faults that clusters have: whatever happens, the run draws the losses that it
would have drawn otherwise, bit by bit, and uses every sample once an epoch.

Each run is `gpt/tiny` made smaller, in fp64, on two nodes of a rank each. What a fault costs is told at the end.
"""

from __future__ import annotations

import pytest

from headway.tests.launch.slurm.launched import EVERY, STEPS

pytestmark = pytest.mark.slurm

FILL = "#!/bin/bash\nsleep 4\n"


def test_a_run_on_two_nodes_draws_the_curve_of_one_process(straight, alone):
    assert straight.starts() == 1
    assert len(straight.losses()) == STEPS
    # fp64: gradients are summed in another order, in 60 steps of a small network.
    assert straight.losses() == pytest.approx(alone.losses(), rel=1e-9)


def test_a_preempted_run_saves_and_goes_on_when_the_nodes_are_free_again(desk, cluster, straight):
    run = desk().launch(partition="low")
    run.wait_for_step(EVERY + 2)
    urgent = cluster.submit(FILL, "--partition=high", "--nodes=3", "--exclusive")
    cost = run.recover("preempted by a job of 4 s", start=2)
    assert cluster.state(urgent) == "COMPLETED"
    assert cost.steps == 0  # it saved where it was
    run.wait_until_done()
    run.prove(straight)


def test_a_run_that_loses_a_node_goes_on_with_another_one(desk, cluster, straight):
    run = desk().launch()
    run.wait_for_step(EVERY + 5)
    assert cluster.hosts(run.job) == ["node1", "node2"]
    cluster.kill_node("node2")
    run.recover("a node lost, gone on with a spare", start=2)
    assert "node2" not in cluster.hosts(run.job)
    run.wait_until_done()
    run.prove(straight)


def test_a_run_whose_time_is_over_saves_and_is_requeued(desk, cluster, straight):
    run = desk().launch()
    run.wait_for_step(EVERY + 2)
    cluster.signal(run.job)  # as Slurm does before the limit; a test of `long` waits for it
    cost = run.recover("time limit: asked to save", start=2)
    assert cost.steps == 0
    run.wait_until_done()
    run.prove(straight)
