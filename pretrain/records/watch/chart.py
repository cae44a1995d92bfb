"""The loss curve as lines of characters: training joined, held-out losses as marks on it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from headway.pretrain.records.progress import short
from headway.pretrain.records.watch.canvas import Canvas, averages_over
from headway.pretrain.records.watch.run import Curves

MARGIN = 7
"""Columns for the numbers of the vertical axis."""
BEGINNING = 0.05
"""Of a long run, the first steps run off the top: they would flatten all that follows."""
LONG = 100
TRAIN, HELDOUT = "cyan", "yellow"


def loss_chart(curves: Curves, width: int, height: int, ascii_only: bool = False) -> list[Text]:
    """`height` lines of at most `width` columns: the curves, with their axes."""
    steps, loss, heldout = curves.column_of_steps(), curves.column("loss"), curves.column("heldout_loss")
    rows, columns = height - 1, width - MARGIN
    if not np.isfinite(loss).any() or rows < 2 or columns < 8:
        return [Text("no loss yet", style="dim")]
    low, high = limits(loss, heldout)
    over = (float(steps[0]), float(max(steps[-1], steps[0] + 1)))

    def dots(y: NDArray, parts: int, cells: int) -> NDArray:
        return (averages_over(steps, y, over, parts) - low) / (high - low) * (cells - 1)

    canvas = Canvas(columns, rows)
    canvas.curve(dots(loss, 2 * columns, 4 * rows).tolist())
    lines = [Text(line, style=TRAIN) for line in canvas.lines(ascii_only)]
    for x, y in marks(steps, heldout, over, columns):
        row = rows - 1 - round((y - low) / (high - low) * (rows - 1))
        if 0 <= row < rows:
            _mark(lines, row, x, "o" if ascii_only else "●")
    numbers = {0: high, rows // 2: high - (high - low) * (rows // 2) / (rows - 1), rows - 1: low}
    labels = [f"{f'{numbers[i]:.4g}':>{MARGIN - 1}} " if i in numbers else " " * MARGIN for i in range(rows)]
    drawn = [Text.assemble((label, "dim"), line) for label, line in zip(labels, lines, strict=True)]
    return [*drawn, _axis(int(over[0]), int(steps[-1]), columns)]


def limits(loss: NDArray, heldout: NDArray) -> tuple[float, float]:
    """What the vertical axis spans."""
    first = int(BEGINNING * len(loss)) if len(loss) > LONG else 0
    values = np.concatenate([loss[first:], heldout[first:]])
    values = values[np.isfinite(values)]
    if not len(values):
        values = loss[np.isfinite(loss)]
    low, high = float(values.min()), float(values.max())
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def marks(steps: NDArray, y: NDArray, over: tuple[float, float], columns: int) -> list[tuple[int, float]]:
    """Column and value of each finite y; of several in a column the last."""
    keep = np.isfinite(y)
    places = ((steps[keep] - over[0]) / (over[1] - over[0]) * (columns - 1)).round().astype(int)
    return list(dict(zip(places.tolist(), y[keep].tolist(), strict=True)).items())


def _mark(lines: list[Text], row: int, x: int, sign: str) -> None:
    line = lines[row]
    lines[row] = Text.assemble(line[:x], (sign, HELDOUT), line[x + 1 :])


def _axis(first: int, last: int, columns: int) -> Text:
    left, right = f"{short(first) if first >= 1e5 else first}", f"step {last}"
    return Text(" " * MARGIN + left + right.rjust(columns - len(left)), style="dim")
