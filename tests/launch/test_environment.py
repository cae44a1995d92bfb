"""The variables of each launcher give the same answer to "who am I"."""

import pytest

from headway.launch.environment import Ranks, find_ranks
from headway.launch.local import without_nproc
from headway.pretrain.errors import JobError


def test_alone():
    assert find_ranks({}) == Ranks(0, 1, 0, 1, "single process")
    assert (
        find_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}).world == 1
    )  # batch shell


def test_launchers():
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    srun = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}
    mpi = {
        f"OMPI_COMM_WORLD_{k}": v
        for k, v in zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "5814", strict=True)
    }
    assert find_ranks(torchrun) == Ranks(5, 8, 1, 4, "torchrun")
    assert find_ranks({**srun, "SLURM_NTASKS_PER_NODE": "4(x2)"}) == Ranks(5, 8, 1, 4, "srun")
    assert find_ranks(mpi) == Ranks(5, 8, 1, 4, "MPI")
    assert find_ranks({**srun, **torchrun}).source == "torchrun"  # torchrun inside srun


def test_nonsense_is_named():
    with pytest.raises(JobError, match="RANK = 'x'"):
        find_ranks({"RANK": "x", "WORLD_SIZE": "8", "LOCAL_RANK": "1"})


@pytest.mark.parametrize("given", [["--nproc", "4"], ["--nproc=4"]])
def test_ranks_get_the_command_line_without_nproc(given):
    assert without_nproc(["train", "gpt/tiny", *given, "--set", "a=b"]) == [
        "train",
        "gpt/tiny",
        "--set",
        "a=b",
    ]
