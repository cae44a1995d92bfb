"""Whether a process can be reached: a connection to its door, a listening socket that nobody serves.

The kernel answers at a door while the process lives, so that a connection tells three things apart without a thread or
a heartbeat: accepted (the process is there, perhaps hung), refused (the host is there, the process is not), no answer
(the host, or the way to it, is not).
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time

PATIENCE = 5.0
"""Seconds that a probe waits for an answer; all doors are tried at once."""
AT_ONCE = 500
"""Connections that a probe makes at a time: processes may often have 1024 files."""
GONE = {errno.ECONNREFUSED, errno.ECONNRESET}
"""Answers of a host where no process has that door."""


def open_door() -> socket.socket:
    """A door on all interfaces, at a port of the system's choice."""
    return socket.create_server(("", 0), backlog=4096)


def probe(places: list[tuple[str, int]], patience: float = PATIENCE) -> list[int]:
    """Try doors (address, port): 0 if a connection is accepted, else the number of the system's error. Takes `patience`
    seconds for every 500 doors, less if all answer."""
    found: list[int] = []
    for first in range(0, len(places), AT_ONCE):
        found += _probe(places[first : first + AT_ONCE], patience)
    return found


def reason(code: int) -> str:
    """What an error number means; those of names that do not resolve are negative."""
    return os.strerror(code) if code > 0 else "the name has no address here"


def _probe(places: list[tuple[str, int]], patience: float) -> list[int]:
    found = [errno.ETIMEDOUT] * len(places)
    deadline = time.monotonic() + patience
    with selectors.DefaultSelector() as selector:
        for i, place in enumerate(places):
            door = socket.socket(socket.AF_INET6 if ":" in place[0] else socket.AF_INET)
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
