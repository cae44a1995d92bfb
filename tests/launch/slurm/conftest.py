"""The virtual Slurm cluster of these tests; where Slurm is missing they are skipped, or fail if it was promised."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from headway.launch.run import train
from headway.tests.launch.slurm import launched
from headway.tests.launch.slurm.cluster import Cluster, missing
from headway.tests.launch.slurm.launched import Desk, MakeDesk, Run


@pytest.fixture(scope="session")
def virtual_slurm() -> Iterator[Cluster]:
    """One cluster of three nodes for all tests of a process."""
    if reason := missing():
        if os.environ.get("HEADWAY_REQUIRE_SLURM"):
            pytest.fail(f"HEADWAY_REQUIRE_SLURM is set, but {reason}")
        pytest.skip(f"NOT TESTED: {reason}")
    with Cluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(virtual_slurm: Cluster) -> Cluster:
    """The cluster with all nodes idle, whatever the test before has done to it."""
    virtual_slurm.clear()
    return virtual_slurm


@pytest.fixture(scope="session")
def straight(virtual_slurm: Cluster, tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Run:
    """A run on two nodes that nothing happens to."""
    virtual_slurm.clear()
    run = Desk(virtual_slurm, tmp_path_factory.mktemp("straight"), corpus, pace=0).launch()
    run.wait_until_done()
    return run


@pytest.fixture(scope="session")
def alone(straight: Run) -> Run:
    """The same in one process, without Slurm."""
    desk = straight.folder.parents[1]
    train(["gpt/tiny", str(desk / "small.yaml")], [f"run.dir={desk / 'runs'}", "run.name=alone"])
    return Run(straight.cluster, desk / "runs/alone")


@pytest.fixture
def desk(straight: Run, cluster: Cluster, tmp_path: Path, corpus: Path) -> MakeDesk:
    """Makes the folder that a test launches from."""
    return lambda pace=0.1: Desk(cluster, tmp_path, corpus, pace)


# -- what faults have cost, told at the end ------------------------------------------------------------------------


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of xdist hands its findings to the one that reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["costs"] = [tuple(cost) for cost in launched.COSTS]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The reporting process collects the findings."""
    found = getattr(node, "workeroutput", {}).get("costs", [])
    launched.COSTS.extend(launched.Cost(*each) for each in found)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What each fault has cost."""
    if lines := launched.summary():
        terminalreporter.section("what faults cost on the virtual Slurm cluster")
        for line in lines:
            terminalreporter.write_line(line)
