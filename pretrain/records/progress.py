"""What a person sees while a run goes on: a live bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class ProgressDisplay:
    """Shows steps `start + 1` to `total`.

    On a terminal a Rich bar; elsewhere a line at the first and the last step and, between them, when another
    twentieth of the steps or `every_seconds` have passed.
    """

    def __init__(
        self, total: int, start: int = 0, *, stream: TextIO | None = None, every_seconds: float = 30.0
    ) -> None:
        self._total, self._start = total, start
        self._seconds: deque[float] = deque(maxlen=50)
        self._every_steps, self._every_seconds = max(1, (total - start) // 20), every_seconds
        self._printed_step, self._printed_at = -math.inf, time.monotonic()
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.completed:>6.0f}/{task.total:.0f}"),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                console=self._console,
            )
            self._task: TaskID = self._bar.add_task("", total=total, completed=start)
            self._bar.start()

    def step(self, values: Mapping[str, Any]) -> None:
        """Show one finished step; keys as in `metrics.jsonl`, any may be missing but `step`."""
        step = int(values["step"])
        if "step_seconds" in values:
            self._seconds.append(float(values["step_seconds"]))
        left = (self._total - step) * median(self._seconds) if self._seconds else None
        text = describe(values, left)
        if self._bar:
            self._bar.update(self._task, completed=step, description=escape(text))
            return
        due = step - self._printed_step >= self._every_steps
        due = due or time.monotonic() - self._printed_at >= self._every_seconds
        if due or step in (self._start + 1, self._total):
            self._printed_step, self._printed_at = step, time.monotonic()
            self.say(f"step {step}/{self._total}  {text}")

    def say(self, text: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(text, markup=False)

    def close(self) -> None:
        if self._bar:
            self._bar.stop()


def describe(values: Mapping[str, Any], seconds_left: float | None = None) -> str:
    """One step in words: `loss 3.214  12.3k tok/s  MFU 41%  2:31 left`."""
    parts = []
    if "loss" in values:
        parts.append(f"loss {values['loss']:.3f}")
    if values.get("heldout_loss") is not None:
        parts.append(f"held-out {values['heldout_loss']:.3f}")
    if "tokens_per_second" in values:
        parts.append(f"{short(values['tokens_per_second'])} tok/s")
    if values.get("mfu") is not None:
        parts.append(f"MFU {100 * values['mfu']:.0f}%")
    if seconds_left:
        parts.append(f"{clock(seconds_left)} left")
    return "  ".join(parts)


def short(number: float) -> str:
    """A number in three or four signs: 12.3k, 4.56M."""
    if not math.isfinite(number):
        return str(number)
    for size, sign in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            return f"{number / size:.3g}{sign}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Seconds as 0:07, 2:31 or 26:05:09."""
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
