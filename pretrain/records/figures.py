"""Curves of the report: matplotlib draws, the page colours.

Pictures are inline SVG whose colours are CSS variables, so that one file suits a light and a dark page, and
whose text stays text. Each carries its points, from which the page's script reads values under the pointer.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

_INK = {
    "#010101": "var(--muted)",
    "#020202": "var(--grid)",
    "#030303": "var(--accent)",
    "#040404": "var(--second)",
}
_MUTED, _GRID, ACCENT, SECOND = _INK
_POINTS = 600
"""A curve keeps at most this many points: more than a screen can show side by side."""


@dataclass(frozen=True)
class Curve:
    """One line of a chart; x and y have equal length, y may hold NaN (a gap)."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str = ACCENT
    points: bool = False
    """Mark each value: for the few values of evaluations."""
    smooth: bool = False
    """Draw the values faintly and a running mean over them, which one spike does not move."""


def draw(
    curves: Sequence[Curve], key: str, *, width: float, height: float, zero: bool = False
) -> Markup | None:
    """A chart as an SVG element with the size in CSS pixels; None if no curve has a finite value.

    Args:
        key: names the chart within the page.
        zero: let the vertical axis begin at 0.
    """
    finite = [c for c in curves if np.isfinite(np.asarray(c.y, dtype=float)).any()]
    if not finite:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key, "path.simplify": True}):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        axes = figure.add_axes((46 / width, 26 / height, 1 - 58 / width, 1 - 40 / height))
        data = [_plot(axes, curve) for curve in finite]
        _style(axes, _limits(finite), zero, width)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
        frame = axes.get_position()
        reading = {
            "box": [frame.x0 * width, (1 - frame.y1) * height, frame.x1 * width, (1 - frame.y0) * height],
            "x": list(axes.get_xlim()),
            "y": list(axes.get_ylim()),
            "curves": data,
        }
    return _inline(buffer.getvalue(), reading)


def _plot(axes: Any, curve: Curve) -> dict[str, Any]:
    """Draw one curve; returns the values that the pointer reads."""
    x, y = np.asarray(curve.x, dtype=float), np.asarray(curve.y, dtype=float)
    y = np.where(np.isfinite(y), y, np.nan)
    few = curve.points or len(x) == 1
    if few:
        keep = np.isfinite(y)
        x, y = x[keep], y[keep]
    mean_x, mean_y, low, high = _thin(x, y)
    if curve.smooth and len(mean_x) > 8:
        axes.fill_between(mean_x, low, high, color=curve.colour, alpha=0.16, linewidth=0)
        axes.plot(mean_x, mean_y, color=curve.colour, linewidth=0.8, alpha=0.45)
        axes.plot(mean_x, _running_mean(mean_y), color=curve.colour, linewidth=1.8)
    else:
        axes.plot(
            mean_x, mean_y, color=curve.colour, linewidth=1.8, marker="o" if few else None, markersize=5
        )
    values = [None if np.isnan(v) else float(f"{v:.5g}") for v in mean_y]
    colour = _INK[curve.colour]
    return {"name": curve.name, "colour": colour, "x": [float(f"{v:.7g}") for v in mean_x], "y": values}


def _thin(x: NDArray, y: NDArray) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Mean, least and greatest of at most `_POINTS` runs of neighbours."""
    if len(x) <= _POINTS:
        return x, y, y, y
    x_parts, y_parts = np.array_split(x, _POINTS), np.array_split(y, _POINTS)
    alive = [bool(np.isfinite(part).any()) for part in y_parts]
    reduced = [
        np.array([f(part) if ok else np.nan for part, ok in zip(y_parts, alive, strict=True)])
        for f in (np.nanmean, np.nanmin, np.nanmax)
    ]
    return np.array([part[-1] for part in x_parts]), reduced[0], reduced[1], reduced[2]


def _running_mean(y: NDArray) -> NDArray:
    """Mean of the middle half of each twentieth of the points around a point; NaN is left out."""
    half, last = max(2, len(y) // 40), len(y) - 1
    found = []
    for i in range(len(y)):
        # Equal reach to both sides keeps the ends of a falling curve from being dragged towards the middle.
        reach = max(2, min(half, i, last - i))
        window = y[max(0, i - reach) : i + reach + 1]
        window = np.sort(window[np.isfinite(window)])
        middle = window[len(window) // 4 : len(window) - len(window) // 4]
        found.append(float(middle.mean()) if len(middle) else np.nan)
    return np.array(found)


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Vertical range: everything but the highest thousandth, so that one spike does not flatten the rest."""
    values = np.concatenate([np.asarray(c.y, dtype=float) for c in curves])
    values = values[np.isfinite(values)]
    low, high = float(values.min()), float(np.quantile(values, 0.999) if len(values) > 200 else values.max())
    margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    return low - margin, high + margin


def _style(axes: Any, limits: tuple[float, float], zero: bool, width: float) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_ylim(0 if zero and limits[0] > -limits[1] else limits[0], limits[1])
    axes.margins(x=0.01)
    axes.patch.set_visible(False)
    axes.figure.patch.set_visible(False)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_GRID)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=11, colors=_MUTED, pad=6)
    round_steps = [1, 2, 2.5, 5, 10]
    axes.yaxis.set_major_locator(MaxNLocator(7 if width > 600 else 4, steps=round_steps))
    axes.xaxis.set_major_locator(MaxNLocator(8 if width > 600 else 4, steps=round_steps, integer=True))
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    high = max(abs(v) for v in axes.get_ylim())
    if high >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    elif high < 1e-2:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1e}".replace("e-0", "e-") if value else "0")


def _inline(svg: str, reading: dict[str, Any]) -> Markup:
    """What matplotlib wrote, made fit to stand within a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'\sid="(figure|axes|patch|line2d|text|matplotlib|xtick|ytick|Fill)[^"]*"', "", svg)
    for sentinel, variable in _INK.items():
        svg = svg.replace(sentinel, variable)
    values = escape(json.dumps(reading, separators=(",", ":")))
    return Markup(svg.replace("<svg", f'<svg class="chart" role="img" data-reading="{values}"', 1))
