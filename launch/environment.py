"""Who am I among the ranks: the variables that torchrun, MPI and Slurm's srun set, read in one place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from headway.parallel.checkpoint.owner import Start
from headway.pretrain.errors import JobError


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `world`, `local_rank` of `local_world` on its host."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    source: str = "single process"

    @property
    def spread(self) -> bool:
        return self.world > 1

    @property
    def one_host(self) -> bool:
        return self.local_world == self.world


# launcher -> names of (rank, world, local rank, local world); the first of which all are there wins. Open MPI inside a
# batch job starts its daemons by srun, whose variables the ranks then have too: MPI comes first.
COMPLETE = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "Open MPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "MPICH": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # and Intel MPI: both are Hydra
}
LOOPBACK = re.compile(r"localhost|127\.[\d.]+|::1")


def find_ranks(environment: Mapping[str, str] = os.environ) -> Ranks:
    """Read the launcher's variables: torchrun's, else RANK and WORLD_SIZE, else MPI's, else srun's.

    Raises:
        JobError: a variable that is no number, is missing beside another, or contradicts another.
    """
    if "RANK" in environment and "WORLD_SIZE" not in environment:
        rule = "RANK and WORLD_SIZE are set together, or neither"
        raise JobError("RANK", environment["RANK"], rule, "unset RANK, or set WORLD_SIZE too")
    ranks = _complete(environment, "torchrun") or _plain(environment)
    ranks = ranks or _complete(environment, "Open MPI") or _complete(environment, "MPICH")
    ranks = ranks or _srun(environment) or Ranks()
    if (size := number(environment, "WORLD_SIZE", ranks.world)) != ranks.world:
        rule = f"there is no RANK beside it, and {ranks.source} means {ranks.world} rank(s)"
        raise JobError("WORLD_SIZE", size, rule, "unset it, or give every process RANK too")
    return _checked(ranks)


def _complete(environment: Mapping[str, str], source: str) -> Ranks | None:
    names = COMPLETE[source]
    if any(name not in environment for name in names):
        return None
    rank, world, local_rank, local_world = (number(environment, name) for name in names)
    return Ranks(rank, world, local_rank, local_world, source)


def _plain(environment: Mapping[str, str]) -> Ranks | None:
    """RANK and WORLD_SIZE as PyTorch documents them. Where nothing is said of the host, all ranks are on one if they
    meet at the loopback, else each has a host of its own (Kubernetes starts them so)."""
    if "RANK" not in environment:
        return None
    rank, world = number(environment, "RANK"), number(environment, "WORLD_SIZE")
    here = bool(LOOPBACK.fullmatch(environment.get("MASTER_ADDR", "localhost")))
    local_rank = number(environment, "LOCAL_RANK", rank if here else 0)
    local_world = number(environment, "LOCAL_WORLD_SIZE", world if here else local_rank + 1)
    return Ranks(rank, world, local_rank, local_world, "RANK and WORLD_SIZE")


def _srun(environment: Mapping[str, str]) -> Ranks | None:
    """A task of a step. A batch script's own shell has SLURM_NTASKS and SLURM_PROCID, but no SLURM_STEP_ID."""
    if any(name not in environment for name in ("SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID")):
        return None
    sizes = "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"  # the second may be the whole job's
    world = next((number(environment, name) for name in sizes if name in environment), None)
    if world is None:
        return None
    rank, local_rank = number(environment, "SLURM_PROCID"), number(environment, "SLURM_LOCALID")
    names = "SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE"
    name = next((name for name in names if name in environment), None)
    tasks = tasks_per_node(name, environment[name]) if name else [world]
    local_world = tasks[min(number(environment, "SLURM_NODEID", 0), len(tasks) - 1)]
    return Ranks(rank, world, local_rank, local_world, "srun")


def tasks_per_node(name: str, value: str) -> list[int]:
    """Slurm's "4(x2),3" as [4, 4, 3]; JobError if it is something else."""
    tasks = []
    for part in value.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise JobError(name, value, 'the launcher\'s variable must read as "4", "4(x2)" or "2,3"')
        tasks += [int(found[1])] * int(found[2] or 1)
    return tasks


def _checked(ranks: Ranks) -> Ranks:
    """Raises JobError for ranks that cannot be."""
    pairs = (
        ("rank", ranks.rank, "ranks", ranks.world),
        ("local rank", ranks.local_rank, "ranks of its host", ranks.local_world),
    )
    for name, value, what, size in pairs:
        if value >= size:
            rule = f"{ranks.source} counts {size} {what}, numbered from 0"
            raise JobError(name, value, rule, f"at most {size - 1}" if size else "at least one rank")
    if ranks.local_world > ranks.world:
        rule = f"a host has at most all of the {ranks.world} ranks that {ranks.source} counts"
        raise JobError("ranks of this host", ranks.local_world, rule, ranks.world)
    return ranks


def number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A variable of the launcher; JobError if it is no number, or missing and without a default."""
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal():
        raise JobError(name, value, "the launcher's variable must be a number")
    return int(value)


def this_start(environment: Mapping[str, str] = os.environ) -> Start:
    """Which start of its job this is, as Slurm counts them; it fences off an earlier one that is still writing.

    SLURM_RESTART_COUNT, unset on the first run, counts within one job: a job that is submitted again begins at 0.
    torchrun's own count of restarts is not read: its agent ends the workers of one attempt before the next.
    """
    if "SLURM_JOB_ID" not in environment:
        return Start()
    cluster = environment.get("SLURM_CLUSTER_NAME", "")
    count = number(environment, "SLURM_RESTART_COUNT", 0)
    return Start(f"Slurm's job {environment['SLURM_JOB_ID']}{cluster and ' of ' + cluster}", count)
