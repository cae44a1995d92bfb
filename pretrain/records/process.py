"""Which process keeps a run's records, so that whoever reads them can tell whether it still lives.

A number alone does not name a process: other hosts, containers and boots have the same numbers, and numbers are
used again. On systems without /proc nothing is known, and nothing is claimed.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def identify(pid: int | None = None) -> dict[str, Any]:
    """What names a process of this machine, this one if none is given: `boot, namespace, pid, started`; empty where
    that cannot be known."""
    pid = os.getpid() if pid is None else pid
    try:
        boot = (PROC / "sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink(PROC / str(pid) / "ns/pid")
        return {"boot": boot, "namespace": namespace, "pid": pid, "started": _stat(pid)[1]}
    except OSError:
        return {}


def alive(process: Mapping[str, Any]) -> bool | None:
    """Whether a process that was so identified still runs; None if that cannot be told from here."""
    here = identify()
    if not here or any(process.get(key) != here[key] for key in ("boot", "namespace")):
        return None
    try:
        state, started = _stat(int(process["pid"]))
    except (FileNotFoundError, ProcessLookupError):
        return False
    except (OSError, KeyError, TypeError, ValueError):
        return None
    return started == process.get("started") and state not in "ZX"  # a zombie has ended


def _stat(pid: int) -> tuple[str, int]:
    """State and start time (in ticks since boot) of a process, fields 3 and 22 of proc(5)."""
    # The second field, the name in brackets, may hold anything, brackets and spaces too.
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])
