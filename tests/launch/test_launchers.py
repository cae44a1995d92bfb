"""A run of two ranks under launchers that we did not write, none of which says where the ranks meet."""

import os
import shutil
import subprocess
import sys

import pytest

from headway.launch import run
from headway.pretrain.records.metrics import read_metrics
from headway.tests.launch.test_train import HEADWAY

OPEN_MPI = "mpirun.openmpi", "--allow-run-as-root", "--oversubscribe", "-n", "2"
MPICH = "mpirun.mpich", "-n", "2"
BY_SHELL = 'export WORLD_SIZE=2; RANK=1 "$@" & RANK=0 "$@"; code=$?; wait $! && exit $code'


@pytest.fixture(scope="module")
def alone(small_job, tmp_path_factory):
    """Losses of one process."""
    folder = tmp_path_factory.mktemp("alone")
    run.train([str(small_job)], [f"run.dir={folder}", "run.name=run", "precision=fp64", "train.steps=5"])
    return [row["loss"] for row in read_metrics(folder / "run")]


@pytest.mark.matrix
@pytest.mark.parametrize(
    "launcher",
    [
        OPEN_MPI,
        MPICH,
        (*MPICH, "sh", "-c", 'env "$@"', "sh"),  # a script stands between the launcher and the rank
        (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "--no-python"),
        ("sh", "-c", BY_SHELL, "sh"),
    ],
    ids=["Open MPI", "MPICH", "MPICH and a script", "torchrun", "RANK and WORLD_SIZE"],
)
def test_two_ranks(launcher, alone, small_job, tmp_path):
    if shutil.which(launcher[0]) is None:
        pytest.skip(f"NOT TESTED: {launcher[0]} is not installed (apt install openmpi-bin mpich)")
    sets = f"run.dir={tmp_path}", "run.name=run", "precision=fp64", "train.steps=5", "parallel.replicate=2"
    options = [part for each in sets for part in ("--set", each)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MASTER_", "RANK", "WORLD_SIZE"))}
    done = subprocess.run(
        [*launcher, *HEADWAY, "train", str(small_job), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "2 rank(s)" in done.stdout
    losses = [row["loss"] for row in read_metrics(tmp_path / "run")]
    assert losses == pytest.approx(alone, rel=1e-12)  # fp64; sums of two ranks are added in another order
