"""Who am I among the ranks: the variables that torchrun, Slurm's srun and MPI set, read in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from headway.parallel.checkpoint.owner import Start
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


def this_start(environment: Mapping[str, str] = os.environ) -> Start:
    """Which start of its job this is, as Slurm counts them; it fences off an earlier one that is still writing.

    SLURM_RESTART_COUNT, unset on the first run, counts within one job: a job that is submitted again begins at 0.
    torchrun's own count of restarts is not read: its agent ends the workers of one attempt before the next.
    """
    if "SLURM_JOB_ID" not in environment:
        return Start()
    cluster = environment.get("SLURM_CLUSTER_NAME", "")
    count = _number(environment, "SLURM_RESTART_COUNT") if "SLURM_RESTART_COUNT" in environment else 0
    return Start(f"Slurm's job {environment['SLURM_JOB_ID']}{cluster and ' of ' + cluster}", count)
