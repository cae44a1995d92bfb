"""Where the ranks meet: the master's address and port, from what the launcher says, so that all ranks know the same
without having talked."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from headway.launch.environment import Ranks, number
from headway.pretrain.errors import JobError

PORTS = range(20000, 30000)
"""Ports that are derived from a job's number; below those that Linux gives to connections (32768 and up)."""
DEFAULT_PORT = 29500
"""As torchrun's, where nothing tells one run of a host from another."""
BY_HAND = "MASTER_ADDR: a host or address of rank 0, and MASTER_PORT: a free port there"


def set_master(ranks: Ranks, environment: MutableMapping[str, str] = os.environ) -> None:
    """Set MASTER_ADDR and MASTER_PORT, where they are not, for ranks that will meet.

    Raises:
        JobError: there are several hosts, and nothing says which one is the first; or torchrun would start ranks again
            that then read what those before them said.
    """
    refuse_stale_store(environment)
    if ranks.spread:
        address = environment.get("MASTER_ADDR") or find_address(ranks, environment)
        port = number(environment, "MASTER_PORT", 0) or find_port(
            ranks, environment
        )  # 0: mpirun by Accelerate
        environment["MASTER_PORT"] = str(port)
        environment["MASTER_ADDR"] = address


def refuse_stale_store(environment: Mapping[str, str]) -> None:
    """torchrun lends its own store to all attempts: ranks that it starts again find the addresses of the dead there."""
    restarts, lent = number(environment, "TORCHELASTIC_MAX_RESTARTS", 0), "TORCHELASTIC_USE_AGENT_STORE"
    if restarts and environment.get(lent) == "True":
        rule = "ranks that torchrun starts again would read where the dead ones were"
        raise JobError(
            "torchrun --max-restarts", restarts, rule, "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        )


def find_address(ranks: Ranks, environment: Mapping[str, str]) -> str:
    """The loopback for ranks of one host; of a step of Slurm its first host, where rank 0 is."""
    if ranks.one_host:
        return "127.0.0.1"
    hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST")
    if ranks.source != "srun" or not hosts:
        rule = (
            f"{ranks.source} spreads {ranks.world} ranks over several hosts and does not say where they meet"
        )
        raise JobError("MASTER_ADDR", None, rule, f"export {BY_HAND}")
    host = first_host(hosts)
    if resolves(host):
        return host
    if address := node_address(host):
        return address
    rule = f"the first host of {hosts} has no address here, and scontrol knows none"
    raise JobError("MASTER_ADDR", host, rule, f"export {BY_HAND}")


def find_port(ranks: Ranks, environment: Mapping[str, str]) -> int:
    """Of a step of Slurm from its job and step; of MPI on one host from the launcher's process."""
    if ranks.source == "srun" and "SLURM_JOB_ID" in environment:
        job, step = number(environment, "SLURM_JOB_ID"), number(environment, "SLURM_STEP_ID", 0)
        return PORTS[(17 * job + step) % len(PORTS)]  # 17: steps of a job beside each other, jobs apart
    if ranks.source in ("Open MPI", "MPICH") and ranks.one_host and (pid := launcher_pid()):
        return PORTS[pid % len(PORTS)]
    return DEFAULT_PORT


def first_host(hosts: str) -> str:
    """First of Slurm's list of hosts: "r[1-2]n[03-17,20],gpu7" begins with r1n03."""
    first = re.split(r",(?![^\[]*\])", hosts)[0]  # commas outside brackets
    return re.sub(r"\[([^\]\-,]+)[^\]]*\]", r"\1", first)


def resolves(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


def node_address(host: str) -> str | None:
    """The address under which Slurm knows a node: names of nodes need not resolve."""
    try:
        said = subprocess.run(
            ["scontrol", "show", "node", host], capture_output=True, text=True, timeout=30, check=False
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.search(r"\bNodeAddr=(\S+)", said)
    return found[1] if found else None


def launcher_pid(variables: tuple[str, ...] = ("PMI_RANK", "OMPI_COMM_WORLD_RANK")) -> int | None:
    """The nearest ancestor that is no rank itself (a script may stand between); None where /proc does not tell."""
    pid = os.getpid()
    try:
        while pid > 1:
            status = Path(f"/proc/{pid}/status").read_text()
            pid = int(re.findall(r"^PPid:\s+(\d+)", status, re.MULTILINE)[0])
            names = {
                entry.split(b"=")[0].decode()
                for entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            }
            if not names & set(variables):
                return pid
    except (OSError, IndexError, UnicodeDecodeError):
        return None
    return None
