"""The start of a run: every rank tells the master's store where it is, and rank 0 calls the roll: it knows who is
missing."""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

from headway.parallel.doors import PATIENCE, open_door, probe, reason
from headway.parallel.interfaces import address_towards, name_interface
from headway.parallel.peers import Member, Peers, name_ranks
from headway.pretrain.errors import JobError, StartError


def meet(rank: int, size: int, timeout: float, gpu: str = "") -> Peers:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT.

    Args:
        timeout: seconds until all must be there.
        gpu: identity of the GPU that NCCL will use.

    Raises:
        StartError: the master cannot be reached, or its port is taken (names host and port), or ranks are missing
            (names them).
        JobError: two ranks of a host have the same GPU.
    """
    deadline = time.monotonic() + timeout
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    door = open_door()
    store = _open_store(rank, size, timeout, place)
    host = socket.gethostname()
    machine = os.environ.get("NCCL_HOSTID") or f"{host} {_boot()}"
    address = address_towards(os.environ["MASTER_ADDR"])
    member = Member(host, machine, address, door.getsockname()[1], gpu)
    try:
        store.set(f"member/{rank}", json.dumps(member))
        if rank == 0:
            store.set("roll", json.dumps(_call_roll(store, size, deadline)))
        else:
            store.wait(["roll"], timedelta(seconds=max(1.0, deadline - time.monotonic()) + 10))
        roll = json.loads(store.get("roll"))
    except dist.DistError as error:
        raise StartError(
            f"rank {rank} on host {host}: the master at {place} was lost while waiting for all ranks"
        ) from error
    _part(store, rank, size, bool(roll.get("failed")))
    if failed := roll.get("failed"):
        raise StartError(failed)
    members = [Member(*each) for each in roll["members"]]
    refuse_shared_gpus(members)
    name_interface([m.address or os.environ["MASTER_ADDR"] for m in members if m.machine != machine])
    return Peers(rank, members, store, door)


def _open_store(rank: int, size: int, timeout: float, place: str) -> dist.Store:
    """The master's store; rank 0 has it, or torchrun's agent."""
    address, port = place.rsplit(":", 1)
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    master = rank == 0 and not agents
    patience = timedelta(seconds=timeout)
    if not master:
        _wait_for_master((address, int(port)), timeout, f"rank {rank} on host {socket.gethostname()}")
    try:
        return dist.TCPStore(
            address, int(port), size, master, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        hint = (
            "is the port taken? Set MASTER_PORT to a free one, on all ranks"
            if master
            else "what listens there?"
        )
        raise StartError(f"rank {rank} finds no store of ours at {place} ({said}): {hint}") from error


def _wait_for_master(place: tuple[str, int], timeout: float, who: str) -> None:
    """Return when something listens there; torch would fill the screen when it gives up."""
    deadline = time.monotonic() + timeout
    while code := probe([place], min(PATIENCE, max(0.1, deadline - time.monotonic())))[0]:
        if time.monotonic() > deadline:
            raise StartError(
                f"{who} cannot reach the master at {place[0]}:{place[1]} within parallel.start_timeout, "
                f"{timeout:g} s ({reason(code)}): is rank 0 running there, and may this host connect to it?"
            )
        time.sleep(0.1)


def _call_roll(store: dist.Store, size: int, deadline: float) -> dict[str, object]:
    """All members by rank, or what is to be said if some did not come."""
    keys = [f"member/{rank}" for rank in range(size)]
    with suppress(dist.DistStoreError):
        store.wait(keys, timedelta(seconds=max(0.01, deadline - time.monotonic())))
    missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
    came = {rank: Member(*json.loads(store.get(keys[rank]))) for rank in range(size) if rank not in missing}
    if not missing:
        return {"members": [came[rank] for rank in range(size)]}
    hosts = sorted({member.host for member in came.values()})
    there = [f"{host} ({name_ranks([r for r, m in came.items() if m.host == host])})" for host in hosts]
    return {
        "failed": f"{name_ranks(missing)} of {size} did not come within parallel.start_timeout. There are: "
        f"{', '.join(there)}. Look at what the hosts of the others say: not started, ended, or no way to the master"
    }


def _part(store: dist.Store, rank: int, size: int, failed: bool) -> None:
    """When the start fails, rank 0 ends last, for its store tells the others why: up to two seconds later."""
    with suppress(dist.DistError):
        store.add("heard", 1)
        came = sum(store.check([f"member/{other}"]) for other in range(size)) if failed and rank == 0 else 0
        until = time.monotonic() + 2
        while failed and rank == 0 and store.add("heard", 0) < came and time.monotonic() < until:
            time.sleep(0.02)


def refuse_shared_gpus(members: list[Member]) -> None:
    """NCCL cannot give a GPU to two ranks; raises JobError naming the ranks, the same on all of them."""
    seen: dict[tuple[str, str], int] = {}
    for rank, member in enumerate(members):
        if member.gpu and (other := seen.setdefault((member.machine, member.gpu), rank)) != rank:
            rule = (
                f"ranks {other} and {rank} on host {member.host} have the same GPU ({member.gpu}), and NCCL needs "
                "one for each: start fewer ranks there, or see that LOCAL_RANK or CUDA_VISIBLE_DEVICES differs"
            )
            raise JobError("parallel.device", "cuda", rule, "one rank for every GPU of the host")


def _boot() -> str:
    """Names this start of the machine's kernel: hosts with the same name are told apart."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""
