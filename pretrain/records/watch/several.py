"""Several runs on one screen, a line each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from headway.pretrain.records.progress import clock, short
from headway.pretrain.records.watch.canvas import sparkline
from headway.pretrain.records.watch.chart import TRAIN
from headway.pretrain.records.watch.run import WatchedRun
from headway.pretrain.records.watch.status import STYLES, Status, ago, judge

CURVE = 16
COLUMNS = {
    "run": 0, "status": 0, "step": 0, "left": 0, "loss": 0, "held-out": 0, "tok/s": 0,
    "MFU": 88, "saved": 100, "curve": 112, "note": 136,
}  # fmt: skip
"""Column -> from how many columns of the terminal on it is shown."""


@dataclass(frozen=True)
class Several:
    """Runs at a time. What does not fit the height is counted."""

    runs: Sequence[WatchedRun]
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        states = [judge(run, self.now) for run in self.runs]
        yield self._title(states)
        room = len(self.runs)
        if options.height is not None and room > options.height - 2:
            room = max(1, options.height - 3)
        table = Table(box=None, header_style="dim", pad_edge=False, expand=False)
        shown = [name for name, width in COLUMNS.items() if options.max_width >= width]
        for name in shown:
            end = name not in ("run", "status", "curve", "note")
            table.add_column(name, justify="right" if end else "left", no_wrap=True, overflow="ellipsis")
        for run, status in list(zip(self.runs, states, strict=True))[:room]:
            line = cells(run, status, self.now, options.ascii_only)
            table.add_row(*(line[name] for name in shown))
        yield table
        if room < len(self.runs):
            yield Text(f"and {len(self.runs) - room} more", "dim")

    def _title(self, states: Sequence[Status]) -> Text:
        title = Text(f"{len(states)} runs", "bold", no_wrap=True, overflow="ellipsis")
        for word, style in STYLES.items():
            if count := sum(status.word == word for status in states):
                title.append(f"  {count} {word}", f"not bold {style}")
        return title


def cells(run: WatchedRun, status: Status, now: float, plain: bool) -> dict[str, Text]:
    """What a run's line has, by column."""
    curves = run.curves
    done, steps = curves.steps[-1] if curves.steps else 0, run.steps
    share = f" {min(1.0, done / steps):4.0%}" if steps else ""
    left = None if status.ended else run.seconds_left
    loss, heldout = curves.last("loss"), curves.last("heldout_loss")
    speed, mfu = curves.recent("tokens_per_second"), curves.recent("mfu")
    sign = "* " if plain else "● "
    return {
        "run": Text(run.name, "bold"),
        "status": Text(sign + status.word, status.style),
        "step": Text(f"{done}/{steps or '?'}{share}"),
        "left": Text(clock(left) if left else ""),
        "loss": Text(f"{loss[1]:.4f}" if loss else ""),
        "held-out": Text(f"{heldout[1]:.4f}" if heldout else ""),
        "tok/s": Text(short(speed) if speed is not None else ""),
        "MFU": Text(f"{100 * mfu:.1f}%" if mfu is not None else ""),
        "saved": Text(f"{ago(now - run.saved.time)} ago" if run.saved else ""),
        "curve": Text("" if plain else sparkline(curves.column("loss"), CURVE), TRAIN),
        "note": Text(status.note, "dim"),
    }
