"""Who am I among the ranks: the variables that torchrun, Slurm's srun and MPI set, read in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from headway.pretrain.errors import JobError


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` of `local_world` on its node."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    source: str = "single process"

    @property
    def spread(self) -> bool:
        return self.world > 1


# launcher -> the names of (rank, world, local rank, local world); the first that is complete wins.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
    "MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read the launcher's variables.

    A batch script's own shell has SLURM_NTASKS but is no task of srun (SLURM_STEP_ID is missing there).

    Raises:
        JobError: a variable that is no number.
    """
    for source, names in LAUNCHERS.items():
        if source == "srun" and "SLURM_STEP_ID" not in environment:
            continue
        if all(name in environment for name in names[:3]):
            rank, world, local = (_number(environment, name) for name in names[:3])
            local_world = _number(environment, names[3]) if names[3] in environment else world
            return Ranks(rank, world, local, local_world, source)
    return Ranks()


def _number(environment: Mapping[str, str], name: str) -> int:
    value = environment[name].split("(")[0]  # SLURM_NTASKS_PER_NODE may read "4(x2)"
    if not value.isdigit():
        raise JobError(name, environment[name], "the launcher's variable must be a number")
    return int(value)


def incarnation(environment: Mapping[str, str] = os.environ) -> int:
    """How often the scheduler has restarted this job; fences off a predecessor that is still writing."""
    names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return sum(_number(environment, name) for name in names if name in environment)
