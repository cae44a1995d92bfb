"""One run on one screen."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.layout import Layout
from rich.panel import Panel
from rich.text import Text

from headway.pretrain.records.progress import clock, short
from headway.pretrain.records.watch.canvas import sparkline
from headway.pretrain.records.watch.chart import HELDOUT, TRAIN, loss_chart
from headway.pretrain.records.watch.run import WatchedRun
from headway.pretrain.records.watch.status import Status, ago, judge, lasts
from headway.pretrain.records.watch.words import describe_events, describe_run

HEIGHT = 24
"""Lines where nothing says how many there are: a file, a pipe."""
EVENTS = 5
HEAD = 3
LABEL, VALUE = 11, 10
"""Columns of a fact; its curve takes the rest."""


@dataclass(frozen=True)
class Page:
    """A run at a time; as wide and as high as where it is shown.

    Attributes:
        now: seconds since the epoch.
    """

    run: WatchedRun
    now: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height, plain = options.max_width, options.height or HEIGHT, options.ascii_only
        status = judge(self.run, self.now)
        if status.word == "empty":
            yield Text(f"{self.run.folder} holds {status.note}; a run that begins there will be shown")
            return
        events = describe_events(self.run.events, EVENTS, self.now)
        body = max(6, height - HEAD - len(events))
        facts = min(46, max(34, width * 2 // 5))
        screen = Layout()
        screen.split_column(
            Layout(Group(*self._head(status, width, plain)), size=HEAD),
            Layout(name="body", size=body),
            Layout(Group(*(_event(*event) for event in events)), size=max(1, len(events))),
        )
        screen["body"].split_row(
            Layout(self._chart(width - facts, body, plain)),
            Layout(self._facts(facts - 4, body - 2, plain), size=facts),
        )
        # A layout fills what it is given.
        yield from console.render(screen, options.update(height=height))

    def _head(self, status: Status, width: int, plain: bool) -> list[Text]:
        first = Text(no_wrap=True, overflow="ellipsis")
        first.append(self.run.name, "bold").append("  ").append("* " if plain else "● ", status.style)
        first.append(status.word, status.style).append(f"  {status.note}" if status.note else "", "dim")
        what = Text(describe_run(self.run), "dim", no_wrap=True, overflow="ellipsis")
        return [first, what, self._progress(width, plain, status)]

    def _progress(self, width: int, plain: bool, status: Status) -> Text:
        run = self.run
        done = run.curves.steps[-1] if run.curves.steps else 0
        left = run.seconds_left if not status.ended else None
        share = min(1.0, done / run.steps) if run.steps else 0.0
        text = f" step {done}/{run.steps or '?'}  {100 * share:.0f}%"
        text += f"  {short(run.curves.total('tokens'))} tokens"
        text += f"  {clock(run.curves.total('step_seconds'))} in steps"
        text += f"  {clock(left)} left" if left else ""
        cells = max(10, width - len(text))
        full = round(share * cells)
        signs = ("#", "-") if plain else ("━", "─")
        bar = Text(signs[0] * full, "green" if status.word != "failed" else "red")
        return bar.append(signs[1] * (cells - full), "dim").append(text)[:width]

    def _chart(self, width: int, height: int, plain: bool) -> Panel:
        lines = loss_chart(self.run.curves, width - 4, height - 2, plain)
        title = Text.assemble(("train", TRAIN), " ", ("held-out", HELDOUT), " loss")
        return Panel(Group(*lines), title=title, title_align="left", height=height, border_style="dim")

    def _facts(self, width: int, height: int, plain: bool) -> Panel:
        lines = [_fact(self.run, *row, width=width, plain=plain) for row in rows(self.run, self.now)]
        return Panel(Group(*lines[:height]), height=height + 2, border_style="dim")


Row = tuple[str, str, str | None]


def rows(run: WatchedRun, now: float) -> list[Row]:
    """Label, value, and which column's curve stands beside it; what there is of it, the most wanted first."""
    last = {name: newest for name in run.curves.values if (newest := run.curves.last(name))}
    found: list[Row] = []
    for name, label, form in (
        ("loss", "loss", "{:.4f}"),
        ("heldout_loss", "held-out", "{:.4f}"),
        ("lr", "lr", "{:.3g}"),
        ("grad_norm", "grad norm", "{:.3g}"),
    ):
        if name in last:
            step, value = last[name]
            at = f"  at {step}" if name == "heldout_loss" else ""
            found.append((label, form.format(value) + at, None if at else name))
    found += _speed(run)
    if "memory_gib" in last:
        found.append(("memory", f"{last['memory_gib'][1]:.3g} GiB", "memory_gib"))
    if saved := run.saved:
        size = "" if saved.size is None else f", {_bytes(saved.size)}"
        found.append(("checkpoint", f"step {saved.step}", None))
        found.append(("  saved", f"{ago(now - saved.time)} ago{size}", None))
    if "joules" in last:
        found += _energy(run)
    return found


def _speed(run: WatchedRun) -> list[Row]:
    """Medians of the last steps."""
    recent, found = run.curves.recent, list[Row]()
    if (pace := recent("tokens_per_second")) is not None:
        found.append(("tokens/s", short(pace), "tokens_per_second"))
    if (seconds := recent("step_seconds")) is not None:
        found.append(("step", lasts(seconds), "step_seconds"))
    if (mfu := recent("mfu")) is not None:
        found.append(("MFU", f"{100 * mfu:.1f}%", "mfu"))
    return found


def _energy(run: WatchedRun) -> list[Row]:
    joules, seconds = run.curves.recent("joules"), run.curves.recent("step_seconds")
    watts = f"{joules / seconds:.3g} W, " if joules is not None and seconds else ""
    return [("energy", f"{watts}{run.curves.total('joules') / 3.6e6:.3g} kWh", None)]


def _fact(run: WatchedRun, label: str, value: str, curve: str | None, *, width: int, plain: bool) -> Text:
    line = Text(f"{label:<{LABEL}}", "dim", no_wrap=True, overflow="ellipsis").append(value, "default")
    cells = width - LABEL - VALUE
    if curve and not plain and cells >= 6:
        line.append(" " * (VALUE - len(value)) + sparkline(run.curves.column(curve), cells), TRAIN)
    return line


def _event(moment: str, text: str, style: str) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    return line.append(f"{moment:>8}  ", "dim").append(text, style)


def _bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"
