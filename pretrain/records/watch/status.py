"""Whether a run goes on, stands still or has ended, judged from what it left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from headway.pretrain.records.process import alive
from headway.pretrain.records.progress import clock
from headway.pretrain.records.watch.run import WatchedRun

PATIENCE = 20.0
"""A run is stale after this many usual steps without a word: evaluations and checkpoints take some too."""
QUIET = 30.0
"""Seconds without a word that mean nothing, however short steps are."""
BEGINNING = 600.0
"""Seconds that the first step may take: kernels are compiled in it."""
STYLES = {
    "empty": "dim",
    "starting": "cyan",
    "running": "green",
    "stale": "yellow",
    "killed": "red",
    "failed": "red",
    "stopped": "yellow",
    "done": "blue",
}
ENDED = ("done", "failed", "stopped", "killed")


@dataclass(frozen=True)
class Status:
    """A word of `STYLES`, and what it rests on."""

    word: str
    note: str = ""

    @property
    def style(self) -> str:
        return STYLES.get(self.word, "default")

    @property
    def ended(self) -> bool:
        return self.word in ENDED


def judge(run: WatchedRun, now: float) -> Status:
    """The state of a run at a time, in seconds since the epoch."""
    if not run.events and not run.curves.steps:
        return Status("starting", "no step yet") if run.job else Status("empty", "no records yet")
    last, quiet = (run.events or [{}])[-1], max(0.0, now - run.active)
    if last.get("kind") == "end":
        return Status(str(last.get("status", "done")), f"{ago(now - float(last.get('time', now)))} ago")
    begun = bool(run.curves.steps) and run.curves.steps[-1] > int(run.start.get("step", 0))
    since = f"{'no step' if begun else 'no first step'} for {ago(quiet)}"
    if alive(run.start.get("process", {})) is False:
        return Status("killed", f"its process is gone, {since}")
    pace = run.curves.recent("step_seconds") or 0.0
    if quiet > (max(QUIET, PATIENCE * pace) if begun else BEGINNING):
        return Status("stale", f"{since}; usually one takes {lasts(pace)}" if begun else since)
    return Status("running" if begun else "starting", "" if begun else since)


def ago(seconds: float) -> str:
    """How long something is past, as people say it: 12 s, 3 min, 5 h, 2 d."""
    seconds = max(0.0, seconds)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{math.floor(seconds / size)} {unit}"
    return f"{math.floor(seconds)} s"


def lasts(seconds: float) -> str:
    """How long something takes: 12 ms, 1.25 s, 2:31."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else clock(seconds)
