"""The other ranks, as hosts on a network: who can still be reached when a collective fails."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import NamedTuple

import torch.distributed as dist

from headway.parallel.doors import GONE, probe, reason
from headway.pretrain.errors import HeadwayError, LostRanksError

FAULTS = ("gloo/", "Timed out waiting", "Connection closed by peer", "NCCL", "nccl", "No route to host")
"""What errors of collectives say that torch raises as plain RuntimeErrors."""


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
        """What a probe of all other ranks finds."""
        others = [rank for rank in range(len(self.members)) if rank != self.rank]
        found = dict(zip(others, probe([self._place(rank) for rank in others]), strict=True))
        away = sorted((self.members[rank].host, code, rank) for rank, code in found.items() if code)
        said = []
        for (host, code), group in groupby(away, key=lambda each: each[:2]):
            ranks = [rank for _, _, rank in group]
            if code in GONE:
                said.append(
                    f"{name_ranks(ranks)} on host {host} ended; the message of the first to end says why"
                )
            else:
                address = self._place(ranks[0])[0]
                said.append(
                    f"host {host} ({name_ranks(ranks)}) cannot be reached at {address}: {reason(code)}"
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

        It comes when the collective fails: at once if a process ended, after `parallel.timeout` seconds at the
        latest if a host does not answer; then the probe takes 5 seconds for every 500 ranks. The process ends after
        that, but for a checkpoint that is being written (half of `parallel.timeout` more at most) and for W&B (30
        seconds at most). With NCCL, whose watchdog ends the process when a collective takes too long, only failures
        that NCCL reports come through here.

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
            said = str(error).strip().splitlines()[0].rsplit("] ", 1)[-1].rstrip(".")
            advice = "Start the run again: it goes on from its newest checkpoint"
            raise LostRanksError(f"{here}: a collective failed ({said}): {self.lost()}. {advice}") from error


def of_collective(error: BaseException) -> bool:
    """Whether torch.distributed raised it because a rank or the way to it failed."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in FAULTS)


def name_ranks(ranks: list[int]) -> str:
    """[1] is "rank 1", [0, 1, 2, 5] is "ranks 0-2, 5"."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and parts[-1][-1] == rank - 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    spans = ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
    return f"rank{'s' * (len(ranks) > 1)} {spans}"
