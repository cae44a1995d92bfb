"""Who may write into a run's folder: the start of the run that came last.

A node that was declared dead may go on writing when its successor has started. The successor leaves a token in
`owner.json`; a process that finds another token there than its own was fenced off, publishes nothing and ends.
"""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.parallel.checkpoint.durable import replace_file
from headway.pretrain.errors import FencedError

OWNER = "owner.json"


@dataclass(frozen=True)
class Start:
    """One start of a run, as the scheduler counts it.

    Attributes:
        job: the scheduler's name of the job, unique; empty where there is none. Counts of two jobs say nothing about
            which of them is later.
        count: how often the scheduler has started the job again.
    """

    job: str = ""
    count: int = 0

    def before(self, other: Start) -> bool:
        """Whether this is certainly the earlier one of two starts."""
        return bool(self.job) and self.job == other.job and self.count < other.count

    def __str__(self) -> str:
        return f"restart {self.count} of {self.job}" if self.job else "a start by hand"


class Owner:
    """One start's claim to a folder.

    Args:
        folder: exists when `take` is called.
        token: names this start; equal on all its ranks.
        start: an earlier start of the same job never takes over; any other takes over from whoever was there.
    """

    def __init__(self, folder: Path, token: int, start: Start) -> None:
        self.path, self.token, self.start = folder / OWNER, token, start

    def take(self) -> None:
        """Become the owner. Raises OSError, FencedError."""
        found = self._read()
        if self.start.before(_start(found)):
            raise self._fenced(found)
        me = {"job": self.start.job, "count": self.start.count, "token": self._mine}
        me |= {"host": socket.gethostname(), "pid": os.getpid()}
        replace_file(self.path, json.dumps(me).encode())

    def taken(self) -> bool:
        """Whether anyone owns the folder: not if someone removed it while the run went on."""
        return self.path.exists()

    def check(self) -> None:
        """Raise FencedError unless this start certainly owns the folder: asked before something is published."""
        found = self._read()
        if found.get("token") != self._mine:
            raise self._fenced(found)

    def successor(self) -> FencedError | None:
        """The error with which this process ends if another start has certainly taken over; read at every step."""
        found = self._read()
        return self._fenced(found) if found.get("token", self._mine) != self._mine else None

    @property
    def _mine(self) -> str:
        return f"{self.token:016x}"

    def _read(self) -> dict[str, Any]:
        try:
            owner = json.loads(self.path.read_bytes())
        except (OSError, ValueError):
            return {}
        return owner if isinstance(owner, dict) else {}

    def _fenced(self, found: dict[str, Any]) -> FencedError:
        theirs = f"{_start(found)}, on host {found.get('host')}, token {found.get('token')}"
        return FencedError(
            f"{self.path}: another start of this run owns the folder ({theirs}; this one is {self.start}, "
            f"token {self._mine}). This process publishes nothing and must end"
        )


def _start(found: dict[str, Any]) -> Start:
    job, count = found.get("job"), found.get("count")
    return Start(job if isinstance(job, str) else "", count if isinstance(count, int) else 0)
