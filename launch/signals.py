"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and stop; a second SIGINT stops it at once."""

from __future__ import annotations

import ctypes
import signal
import sys
from contextlib import suppress
from types import FrameType

from headway.launch.environment import Ranks

ASKED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopRequest:
    """Whether this process was asked to stop. Entered as a context it takes over the signals."""

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        self._before = {s: signal.signal(s, self._note) for s in ASKED}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


_PR_SET_PDEATHSIG = 1


def end_with_launcher(ranks: Ranks) -> None:
    """Have Linux send this rank a SIGTERM when the process that started it dies: a rank whose launcher was killed saves
    and stops, and does not live on unseen. Of ranks that were started by hand nobody is the launcher."""
    if ranks.source in ("torchrun", "Open MPI", "MPICH", "srun") and sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))
