"""The other ranks, as hosts on a network: who came to the start, and who can still be reached when a collective fails.

Before the first process group every rank tells its host and address to the store of the master, and rank 0 calls the
roll: it knows who is missing. Every rank keeps a door open, a listening socket that nobody serves. The kernel answers
there while the process lives, so that a connection tells three things apart without a thread or a heartbeat: accepted
(the process is there, perhaps hung), refused (the host is there, the process is not), no answer (the host, or the way
to it, is not).
"""

from __future__ import annotations

import errno
import json
import os
import selectors
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist

from headway.parallel.interfaces import address_towards, name_interface
from headway.pretrain.errors import HeadwayError, JobError, LostRanksError, StartError

PATIENCE = 5.0
"""Seconds that a probe waits for an answer; all doors are tried at once."""
DOORS = 500
"""Connections that a probe makes at a time: processes may often have 1024 files."""
FAULTS = ("gloo/", "Timed out waiting", "Connection closed by peer", "NCCL", "nccl", "No route to host")
"""What errors of collectives say that torch raises as plain RuntimeErrors."""
GONE = {errno.ECONNREFUSED, errno.ECONNRESET}


class Member(NamedTuple):
    """Where a rank is.

    Attributes:
        host: its name.
        machine: what NCCL takes for one host.
        address: of its door; empty for that of the master.
        port: of its door.
        gpu: identity of its GPU; empty if NCCL does not use one.
    """

    host: str
    machine: str
    address: str
    port: int
    gpu: str = ""


class Peers:
    """All ranks of a run, as they said at the start.

    Attributes:
        store: of the master, for process groups.
    """

    def __init__(self, rank: int, members: list[Member], store: dist.Store, door: socket.socket) -> None:
        self.rank, self.members, self.store, self._door = rank, members, store, door

    def lost(self) -> str:
        """What a probe of all other ranks finds; takes `PATIENCE` seconds for every 500 ranks, less if all answer."""
        others = [rank for rank in range(len(self.members)) if rank != self.rank]
        found = {}
        for first in range(0, len(others), DOORS):
            some = others[first : first + DOORS]
            found |= dict(zip(some, probe([self._place(rank) for rank in some]), strict=True))
        away = sorted((self.members[rank].host, code, rank) for rank, code in found.items() if code)
        said = []
        for (host, code), group in groupby(away, key=lambda each: each[:2]):
            ranks = [rank for _, _, rank in group]
            if code in GONE:
                said.append(f"{_ranks(ranks)} on host {host} ended; the message of the first to end says why")
            else:
                address = self._place(ranks[0])[0]
                said.append(
                    f"host {host} ({_ranks(ranks)}) cannot be reached at {address}: {os.strerror(code)}"
                )
        if not said:
            return "all other ranks answer: one of them hangs, or the way to it was cut and is mended again"
        return "; ".join(sorted(said, key=lambda sentence: not sentence.startswith("host")))

    def _place(self, rank: int) -> tuple[str, int]:
        member = self.members[rank]
        return member.address or os.environ["MASTER_ADDR"], member.port

    @contextmanager
    def named(self, where: Callable[[], str]) -> Iterator[None]:
        """Turn the failure of a collective in the block into one error that names who was lost.

        It comes when the collective fails: at once if a process ended, after `parallel.timeout` seconds at the latest
        if a host does not answer; then the probe takes `PATIENCE` seconds. With NCCL, whose watchdog ends the process
        when a collective takes too long, only failures that NCCL reports earlier come through here.

        Raises:
            LostRanksError: names this rank, where it was, and the ranks and hosts that do not answer.
        """
        try:
            yield
        except HeadwayError:
            raise
        except Exception as error:
            if not of_collective(error):
                raise
            here = f"rank {self.rank} on host {self.members[self.rank].host}, {where()}"
            reason = str(error).strip().splitlines()[0].rsplit("] ", 1)[-1].rstrip(".")
            advice = "Start the run again: it goes on from its newest checkpoint"
            raise LostRanksError(
                f"{here}: a collective failed ({reason}): {self.lost()}. {advice}"
            ) from error


def of_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it because a rank or the way to it failed."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in FAULTS)


def meet(rank: int, size: int, timeout: float, gpu: str = "") -> Peers:
    """Wait for all ranks at MASTER_ADDR and MASTER_PORT.

    Args:
        timeout: seconds until all must be there.
        gpu: identity of the GPU that NCCL will use.

    Raises:
        StartError: the master cannot be reached (names host and port), or ranks are missing (names them).
        JobError: two ranks of a host have the same GPU.
    """
    deadline = time.monotonic() + timeout
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    door = socket.create_server(("", 0), backlog=4096)
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
    try:
        return dist.TCPStore(
            address, int(port), size, master, timeout=patience, wait_for_workers=False, multi_tenant=True
        )
    except (dist.DistError, RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        if master:
            hint = "is the port taken? Set MASTER_PORT to a free one, on all ranks"
            raise StartError(f"rank 0 cannot open the master's port at {place} ({reason}): {hint}") from error
        here = f"rank {rank} on host {socket.gethostname()}"
        raise StartError(
            f"{here} cannot reach the master at {place} within parallel.start_timeout, {timeout:g} s ({reason}): is "
            "rank 0 running there, and may this host connect to it?"
        ) from error


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
    there = [f"{host} ({_ranks([r for r, m in came.items() if m.host == host])})" for host in hosts]
    return {
        "failed": f"{_ranks(missing)} of {size} did not come within parallel.start_timeout. There are: "
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


def probe(places: list[tuple[str, int]], patience: float = PATIENCE) -> list[int]:
    """Try all doors at once: 0 if a connection is accepted, else the number of the system's error."""
    found = [errno.ETIMEDOUT] * len(places)
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        for i, place in enumerate(places):
            door = socket.socket()
            door.setblocking(False)
            try:
                found[i] = door.connect_ex(place)
            except OSError as error:  # a name that does not resolve any more
                found[i] = error.errno or errno.EHOSTUNREACH
            if found[i] != errno.EINPROGRESS:
                door.close()
                continue
            found[i] = errno.ETIMEDOUT
            selector.register(door, selectors.EVENT_WRITE, i)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                door = key.fileobj  # type: ignore[assignment]
                found[key.data] = door.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                selector.unregister(door)
                door.close()
        for key in list(selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]
    return found


def _ranks(ranks: list[int]) -> str:
    """[1] is "rank 1", [0, 1, 2, 5] is "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    spans = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
    return f"rank{'s' * (len(ranks) > 1)} {spans}"


def _boot() -> str:
    """Names this start of the machine's kernel: hosts with the same name are told apart."""
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""
