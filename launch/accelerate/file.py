"""A config file of Accelerate (`accelerate config`): read by Accelerate's own loader, and the processes it asks for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import yaml

from headway.launch.accelerate.asks import Given
from headway.launch.accelerate.deepspeed_json import read_json
from headway.launch.environment import Ranks
from headway.launch.local import Hosts
from headway.pretrain.errors import JobError

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

OPTION = "--accelerate"
UNKNOWN = -1
"""num_processes of a file that leaves them to the command line."""
SECTIONS = {
    "dynamo_config": "dynamo",
    "fsdp_config": "fsdp",
    "deepspeed_config": "deepspeed",
    "megatron_lm_config": "megatron_lm",
    "parallelism_config": "parallelism_config",
    "fp8_config": "fp8",
    "mpirun_config": "mpirun",
}
"""Section of a file -> section of `mapping.RULES`."""


@dataclass(frozen=True)
class Processes:
    """What is started on this host: so many ranks beside those of other hosts, which see these GPUs only."""

    local: int = 1
    hosts: Hosts = field(default_factory=Hosts)
    gpus: str | None = None

    @property
    def ranks(self) -> Ranks:
        """As the first rank will find itself."""
        return Ranks(0, self.local * self.hosts.count, 0, self.local, "a config file of Accelerate")


def load(path: str) -> ClusterConfig:
    """The file as Accelerate reads it.

    Raises:
        JobError: what Accelerate says against it, unknown keys among them, or that it is not installed.
    """
    try:
        from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
    except ImportError as error:
        raise JobError(OPTION, path, f"needs Accelerate ({error})", "pip install accelerate") from None
    try:
        config = load_config_from_file(path)
    except (OSError, ValueError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise JobError(OPTION, path, f"Accelerate cannot read it: {' '.join(str(error).split())}") from None
    if not isinstance(config, ClusterConfig):
        raise JobError(OPTION, path, "is a config file of SageMaker", "compute_environment: LOCAL_MACHINE")
    return config


def read_file(path: str) -> list[Given]:
    """What a file asks for; raises JobError if it cannot be read."""
    config, given = load(path), list[Given]()
    for name, plain in type(config).__dataclass_fields__.items():
        value = getattr(config, name)
        if section := SECTIONS.get(name):
            pairs = [(key, each) for key, each in value.items() if each is not None]
            given += [Given(_label(name, key), each, _named(section, key)) for key, each in pairs]
        elif value is not None and value != plain.default:
            given.append(Given(name, getattr(value, "value", value), name))
    return [*given, *read_json(given)]


def _label(section: str, key: str) -> str:
    """How a key is called to people: most repeat their section."""
    return key if key.startswith(section.removesuffix("config")) else f"{section}.{key}"


def _named(section: str, key: str) -> str:
    """A key as the tables have it: without the prefix that repeats its section."""
    return f"{section}.{key.removeprefix(f'{section}_')}"


def processes(path: str, nproc: int | None) -> Processes:
    """The processes that a file asks for.

    Args:
        nproc: of this host, as the command line says; None if it does not.

    Raises:
        JobError: counts that cannot be, or that are not known, or another one on the command line.
    """
    config = load(path)
    hosts, total = config.num_machines or 1, config.num_processes
    if total == UNKNOWN:
        if nproc is None:
            raise JobError(
                "num_processes", None, "the file leaves it to the command line", f"{OPTION} FILE --nproc N"
            )
        total = nproc * hosts
    if total < 1 or total % hosts:
        rule = f"must be a multiple of num_machines = {hosts}"
        raise JobError("num_processes", total, rule, max(1, total // hosts) * hosts)
    local = total // hosts
    if nproc not in (None, local):
        rule = f"num_processes = {total} in {path}, on {hosts} host(s)"
        raise JobError("--nproc", nproc, rule, local)
    if hosts > 1 and (not config.main_process_ip or not config.main_process_port):
        rule = f"num_machines = {hosts}: they meet at main_process_ip and main_process_port"
        raise JobError(
            "main_process_ip", config.main_process_ip, rule, "an address and a free port of the first host"
        )
    if not 0 <= config.machine_rank < hosts:
        raise JobError(
            "machine_rank", config.machine_rank, f"must be one of {hosts} hosts, from 0", hosts - 1
        )
    meet = config.main_process_ip, config.main_process_port, config.rdzv_backend or "static"
    gpus = None if config.gpu_ids in (None, "all") else str(config.gpu_ids)
    return Processes(local, Hosts(hosts, config.machine_rank, *meet), gpus)


def check_ranks(path: str, ranks: Ranks) -> None:
    """Raise JobError if other ranks were started than a file asks for."""
    total = load(path).num_processes
    if total not in (UNKNOWN, ranks.world):
        rule = f"{ranks.source} started {ranks.world}"
        raise JobError("num_processes", total, rule, ranks.world)
