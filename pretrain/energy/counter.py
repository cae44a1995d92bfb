"""What all counters of energy have in common."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class Unmeasured(Exception):
    """A counter is missing, closed to us, or broken; the message says why."""


@dataclass(frozen=True)
class Reading:
    """Energy in joules, over so many seconds."""

    joules: float
    seconds: float

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds if self.seconds > 0 else 0.0


class Counter(Protocol):
    """Energy of a part of the machine."""

    source: str
    """What counts, in words: `RAPL package-0, dram`, or `estimate: ...`."""
    estimate: bool
    """Whether nothing is measured."""

    def joules(self) -> float:
        """Energy since the counter was opened. Raises Unmeasured where it can no longer be told."""

    def close(self) -> None: ...


class Sampler:
    """Calls a function every so many seconds, on a thread of its own, until it is closed."""

    def __init__(self, every: float, call: Callable[[], object]) -> None:
        self._every, self._call, self._end = every, call, threading.Event()
        self._thread = threading.Thread(target=self._run, name="headway-energy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every):
            self._call()

    def close(self) -> None:
        self._end.set()
        self._thread.join()
