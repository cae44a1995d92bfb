"""A process that has imported what ranks need, and forks them: a rank then starts in milliseconds, not in seconds.

It has one thread and computes nothing, so that its forks are whole.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe
from multiprocessing.reduction import recv_handle, send_handle


class Nursery:
    """Forks processes that have imported some modules; it starts when the first is asked for.

    Args:
        modules: the first has `live`, which a process calls and then ends.
    """

    def __init__(self, *modules: str) -> None:
        self.modules = modules
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def start(self, pipe: Connection, **arguments: object) -> int:
        """Fork a process that calls `live(pipe, **arguments)` of the first module; its number."""
        if self._pipe is None:
            self._open()
        assert self._pipe is not None
        assert self._process is not None
        self._pipe.send(("start", arguments))
        send_handle(self._pipe, pipe.fileno(), self._process.pid)
        return int(self._pipe.recv())

    def end(self, number: int) -> int:
        """Kill a process if it still runs; its exit code, negative for a signal's."""
        assert self._pipe is not None
        self._pipe.send(("end", number))
        return int(self._pipe.recv())

    def _open(self) -> None:
        self._pipe, theirs = Pipe()
        # Not a fork of this process, which has threads, nor multiprocessing's server: ranks have another path (-P).
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno()), *self.modules], pass_fds=[theirs.fileno()]
        )
        theirs.close()


def _serve(pipe: Connection, modules: list[str]) -> None:
    """Fork what is asked for, until the other end is closed."""
    first, *_ = map(importlib.import_module, modules)
    live = first.live
    assert len(os.listdir("/proc/self/task")) == 1, "a module has started a thread, which forks would lack"
    while True:
        try:
            order, given = pipe.recv()
        except EOFError:
            return
        if order == "end":
            pipe.send(_ended(given))
            continue
        handle = recv_handle(pipe)
        child = os.fork()
        if child == 0:
            pipe.close()
            live(Connection(handle), **given)
            os._exit(0)
        os.close(handle)
        pipe.send(child)


def _ended(child: int) -> int:
    """The exit code of a child: of one that has ended already its own, of another that of the kill."""
    os.kill(child, signal.SIGKILL)  # nobody has waited for it, so its number is its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), sys.argv[2:])
