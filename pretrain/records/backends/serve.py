"""The process of a client: it talks to a service, so that the training process never does (`pipe.py`).

Reads one JSON command a line from standard input and answers with one JSON message a line on standard output.
A dead server, a bad key or a full disk stops this process at most. If the training process is killed, the end of
the input is seen here, and the client finishes with everything that was sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, BinaryIO, Protocol

Command = dict[str, Any]


class Client(Protocol):
    """What talks to a service."""

    def obey(self, command: Command) -> bool:
        """Carry out one command; False after the last one."""

    def leave(self) -> None:
        """End what the service's own client has begun."""


class Voice:
    """The way back to the training process."""

    def __init__(self) -> None:
        self._out = sys.stdout

    def take_pipes(self) -> BinaryIO:
        """Keep both pipes for commands and messages: what a service's client prints goes to the log, and what it
        starts inherits neither. Returns the commands."""
        commands = os.fdopen(os.dup(0), "rb")
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        return commands

    def tell(self, **message: Any) -> None:
        with contextlib.suppress(OSError, ValueError):  # nobody may be listening any more
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()


VOICE = Voice()
tell = VOICE.tell


def serve(who: str, make: Callable[[Command], Client]) -> None:
    """The whole life of the process.

    Args:
        who: whom the client talks to, as warnings name it.
        make: begins; is given the first command.
    """
    # The end of the run decides when this ends, not the Ctrl-C or the signal that is meant for training.
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"):
        with contextlib.suppress(AttributeError, ValueError):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    os.nice(10)  # where all cores are busy, training goes first
    commands: queue.Queue[Command] = queue.Queue()
    threading.Thread(target=receive, args=(VOICE.take_pipes(), commands), daemon=True).start()
    try:
        client = make(commands.get())
        while client.obey(commands.get()):
            pass
        client.leave()
        tell(finished=True)
    except Exception as error:
        tell(
            warning=f"{who} stopped recording ({brief(error)}); the run goes on, metrics.jsonl has everything"
        )
    os._exit(0)  # not through clean-up at exit, which may wait for what failed


def receive(lines: BinaryIO, commands: queue.Queue[Command]) -> None:
    """Take commands off the pipe at once, so that it never fills while the service is busy."""
    last_words = None
    for line in lines:
        with contextlib.suppress(ValueError):  # a writer that was killed leaves a torn line
            command = json.loads(line)
            last_words = command.get("last_words", last_words)
            commands.put(command)
    # The end without a `finish` means that the training process died. Uploading has a minute, then is given
    # up: what could not be sent is in the run's folder.
    threading.Timer(60, os._exit, args=(1,)).start()
    if last_words:
        commands.put({"do": "alert", "alert": last_words})
    commands.put({"do": "finish", "exit_code": 1})


def brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
