"""`headway watch`: runs as they go, on a terminal; where there is none, once."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, RenderableType
from rich.live import Live

from headway.pretrain.errors import JobError
from headway.pretrain.records.watch.page import HEIGHT, Page
from headway.pretrain.records.watch.run import WatchedRun, is_run
from headway.pretrain.records.watch.several import Several
from headway.pretrain.records.watch.status import judge

PIPE_WIDTH = 100
"""Columns where there is no terminal."""
OVER = ("done", "failed", "killed")
"""With these a run is over; one that was stopped is perhaps started again by the scheduler."""


class Watch:
    """The runs below some paths: run folders, or folders that hold them, in which new ones may appear."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._runs: dict[Path, WatchedRun] = {}

    def look(self) -> RenderableType:
        """Read what is new; what is to be shown now."""
        runs = [self._runs.setdefault(folder, WatchedRun(folder)) for folder in find_runs(self._paths)]
        for run in runs:
            run.refresh()
        self.over = all(judge(run, time.time()).word in OVER for run in runs)
        return Page(runs[0], time.time()) if len(runs) == 1 else Several(runs, time.time())


def watch(paths: Sequence[str], *, once: bool, interval: float, svg: str | None = None) -> None:
    """Show runs until all are over or someone presses Ctrl-C, the last picture stays.

    Args:
        once: show them as they are, and end.
        interval: seconds between looks.
        svg: file to which the picture is written instead.
    Raises:
        JobError: a path that is not there.
    """
    watched, console = Watch([checked(path) for path in paths]), Console(highlight=False)
    if svg is not None:
        return draw(watched.look(), Path(svg))
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPE_WIDTH
    if console.is_terminal and not once:
        with contextlib.suppress(KeyboardInterrupt):
            follow(watched, console, interval)
    console.print(watched.look())


def follow(watched: Watch, console: Console, interval: float) -> None:
    """Look again and again, on a screen of its own, until all runs are over."""
    with Live(watched.look(), console=console, screen=True, auto_refresh=False) as live:
        while not watched.over:
            time.sleep(interval)
            live.update(watched.look(), refresh=True)


def draw(shown: RenderableType, path: Path) -> None:
    """Write a picture as SVG."""
    console = Console(record=True, width=PIPE_WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True)
    console.print(shown)
    picture = console.export_svg(title="headway watch")
    # Without the fonts that Rich would fetch from the network: any monospaced one will do.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")
    print(path)


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """Each path that is a run's folder, and the run folders in each that is none, in order of their names; a single
    path without any stands for a run to come."""
    found = list[Path]()
    for path in paths:
        within = sorted(path.iterdir()) if path.is_dir() and not is_run(path) else []
        found += [path] if is_run(path) else [folder for folder in within if is_run(folder)]
    return list(dict.fromkeys(found)) or list(paths[:1])


def checked(path: str) -> Path:
    """A folder that is there; raises JobError otherwise."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    others = folder.parent.iterdir() if folder.parent.is_dir() else []
    near = difflib.get_close_matches(path, [str(other) for other in others if other.is_dir()], n=1, cutoff=0)
    raise JobError("run", path, "is no folder", near[0] if near else None)
