"""A client in a process of its own, from the side of the training process: hand over, never wait, never fail.

What talks to a service (W&B's client, one of Accelerate's trackers) may wait for a network, patch what it finds or
end the process that it lives in. Handing over a command is one write to a pipe that does not block; only `finish`
waits, for a stated time. The other side is `serve.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

_BUFFER = 64 * 2**20
"""Bytes that may wait for a client that does not read."""


class ClientPipe:
    """A client and the pipes to it.

    Args:
        who: whom the client talks to, as warnings name it.
        program: the module that runs in the process, and its arguments.
        folder: is made; `client.log` in it takes what the client prints.
        environment: of the process.
        warn: is told, in one sentence, what is amiss.
        heard: is told every message that is no warning.
        timeout: seconds that the end waits for the last data.
    """

    def __init__(
        self,
        who: str,
        program: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        warn: Callable[[str], None],
        heard: Callable[[dict[str, Any]], None],
        timeout: float,
    ) -> None:
        self._who, self._folder, self._warn, self._heard = who, folder, warn, heard
        self.timeout = timeout
        self._pending, self._inbox = bytearray(), b""
        self._alive, self._warned = True, False
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "client.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
                env=dict(environment),
            )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self._in, self._out = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)

    def send(self, **command: Any) -> None:
        """Hand over a command, and pass on what the client has said."""
        if not self._alive:
            return
        self._pending += (json.dumps(command, default=str) + "\n").encode()
        self._push()
        self._listen()
        if len(self._pending) > _BUFFER:
            self._warn(
                f"the {self._who} client does not read any more; it is left behind, metrics.jsonl has everything"
            )
            self.end(patience=0.0)

    def finish(self, later: Callable[[], str]) -> None:
        """Hand over the rest and wait, at most `timeout` seconds; then the client is ended.

        Args:
            later: what a person can do about data that was not taken.
        """
        deadline = time.monotonic() + self.timeout
        finished = False
        while self._alive and not finished and time.monotonic() < deadline:
            waiting = [self._in] if self._pending else []
            select.select([self._out], waiting, [], max(0.0, deadline - time.monotonic()))
            self._push()
            finished = self._listen()
        if self._alive and not finished:
            self._warn(f"{self._who} did not take the last data within {self.timeout:.0f} s; {later()}")
        self.end(patience=5.0 if finished else 0.0)

    def end(self, patience: float) -> None:
        """End the client, after so many seconds by force."""
        self._alive = False
        self._pending.clear()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it has started too, if that is stuck
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _push(self) -> None:
        try:
            while self._pending:
                del self._pending[: os.write(self._in, self._pending)]
        except BlockingIOError:
            return
        except OSError:  # the client is gone; it has said why, or the pipe's end says so
            self._pending.clear()

    def _listen(self) -> bool:
        """Pass on what the client says; True once it has finished."""
        finished, chunk = False, b"-"
        while chunk:
            try:
                chunk = os.read(self._out, 65536)
            except BlockingIOError:
                break
            self._inbox += chunk
        *lines, self._inbox = self._inbox.split(b"\n")
        for line in lines:
            message = json.loads(line)
            finished = finished or "finished" in message
            if "warning" in message:
                self._warned = True
                self._warn(message["warning"])
            else:
                self._heard(message)
        if not chunk and not finished:  # the end of its output
            if not self._warned:
                log = self._folder / "client.log"
                self._warn(f"the {self._who} client ended early, see {log}; the run goes on")
            self.end(patience=1.0)
        return finished
