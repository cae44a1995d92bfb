"""The virtual Slurm cluster of these tests; where Slurm is missing they are skipped, or fail if it was promised."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from headway.tests.launch.slurm.cluster import Cluster, missing


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
