"""What is asked of Slurm: nodes, time, and how ranks start there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from headway.pretrain.config.base import Count, Positive, Section
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import parse_yaml, validate_as


class Request(Section):
    """A batch job. What a cluster has in common for all runs stands in a YAML file of these keys (`--cluster`)."""

    nodes: Positive = 1
    gpus_per_node: Count = 0
    """GPUs of a node, each with a rank of its own; 0 trains on CPUs."""
    tasks_per_node: Positive | None = None
    """Ranks of a node; as many as GPUs, or one, if not given."""
    cpus_per_task: Positive | None = None
    mem: str | None = None
    """Memory of a node, as `sbatch --mem` takes it; the partition's default if not given."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclude: str | None = None
    """Nodes that are not to be used, as Slurm lists them: `node[3,7]`."""
    time: str | Positive = "24:00:00"
    """How long the job may run: `minutes`, `h:mm:ss` or `days-h:mm:ss`."""
    signal_before: Positive | None = None
    """Seconds before that time at which the ranks are asked to save; 300, or a tenth of a shorter time, if not
    given."""
    requeue: bool = True
    """Start again after a time limit, a preemption, a lost node or a fault."""
    max_faults: Count = 3
    """Faults in a row, without a new checkpoint between them, after which the job is given up."""
    exclude_after: Count = 2
    """Faults on a node after which it is left out; 0 leaves none out."""
    launcher: Literal["srun", "torchrun"] = "srun"
    """`srun` starts every rank and tells how it ended. `torchrun` is one agent a node that `srun` starts; it hides the
    exit codes of its ranks, and gives them two minutes to save after a signal."""
    interface: str | None = None
    """Network interface of NCCL's bootstrap and of gloo, e.g. `ib0`; theirs to choose if not given."""
    container: str | None = None
    """Image in which ranks run."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    container_mounts: list[str] = []
    """Folders that are seen in the container, `HOST:INSIDE` each; the working folder always is."""
    env: dict[str, str | int] = {}
    """Variables that ranks get, e.g. NCCL's."""
    setup: list[str] = []
    """Lines of shell before the ranks start, e.g. `module load cuda`."""
    srun: list[str] = []
    """More arguments of `srun`."""
    sbatch: list[str] = []
    """More `#SBATCH` lines, e.g. `--licenses=scratch:1`."""

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def warning_seconds(self) -> int:
        """Seconds before the end of the time at which ranks are asked to save."""
        return self.signal_before or min(300, seconds_of(self.time) // 10)


def seconds_of(time: str | int) -> int:
    """Seconds of a time as sbatch takes it (`sbatch --time`): minutes, minutes:seconds, hours:minutes:seconds,
    days-hours, days-hours:minutes, days-hours:minutes:seconds.

    Raises:
        JobError: none of these.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time))
    if not found:
        raise JobError("--time", time, "must be minutes, h:mm:ss or days-h:mm:ss", "24:00:00")
    days, *parts = (int(part) if part is not None else None for part in found.groups())
    given = [part for part in parts if part is not None]
    all_units = (3600, 60, 1)
    units = all_units if days is not None or len(given) == 3 else all_units[1 : 1 + len(given)]
    return (days or 0) * 86400 + sum(n * unit for n, unit in zip(given, units, strict=False))


def read_request(cluster: str | None, options: Mapping[str, Any]) -> Request:
    """A cluster's file, then what the command line says; raises JobError or InvalidJob.

    Args:
        cluster: the name of one that Headway ships (`cluster/dgx_h100`), or a path.
    """
    tree: dict[str, Any] = {}
    if cluster is not None:
        path = find_cluster(cluster)
        tree = parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
        if not isinstance(tree, dict):
            raise JobError("--cluster", cluster, "must be a mapping of settings, as nodes: 2")
    given = {key: value for key, value in options.items() if value not in (None, [], {})}
    if "env" in given:
        given["env"] = {**tree.get("env", {}), **given["env"]}
    request = validate_as(Request, {**tree, **given})
    check(request)
    return request


def find_cluster(name: str) -> Path:
    """The file of a cluster; raises JobError with those that Headway ships."""
    folder = Path(str(files("headway.configs"))) / "cluster"
    known = {f"cluster/{path.stem}": path for path in sorted(folder.glob("*.yaml"))}
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    rule = f"is neither a file nor a cluster that Headway ships ({', '.join(known)})"
    raise JobError("--cluster", name, rule)


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE each; raises JobError."""
    for one in given:
        if not re.fullmatch(r"[A-Za-z_]\w*=.*", one, re.DOTALL):
            raise JobError(option, one, "must have the form NAME=VALUE", "NCCL_IB_HCA=mlx5")
    return dict(one.split("=", 1) for one in given)


def check(request: Request) -> None:
    """Refuse what contradicts itself; raises JobError."""
    seconds = seconds_of(request.time)
    if request.warning_seconds >= seconds:
        rule = f"must be less than the {seconds} seconds of --time {request.time}"
        raise JobError("--signal-before", request.signal_before, rule, max(1, seconds // 10))
    if request.gpus_per_node and request.tasks_per_node and request.tasks_per_node > request.gpus_per_node:
        rule = f"each rank has a GPU of its own, and a node has {request.gpus_per_node}"
        raise JobError("--tasks-per-node", request.tasks_per_node, rule, request.gpus_per_node)
    if request.container_mounts and not request.container:
        raise JobError("container_mounts", request.container_mounts, "has no effect without --container", [])
