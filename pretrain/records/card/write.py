"""`MODEL_CARD.md` and `DATA_SHEET.md` (Mitchell et al. 2019; Gebru et al. 2018), from a run's records alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jinja2

from headway.pretrain.files import publish
from headway.pretrain.records.card.metadata import TASKS, distils, front_matter, measures
from headway.pretrain.records.card.public import cell, public, public_name
from headway.pretrain.records.card.story import Story
from headway.pretrain.records.charts import column
from headway.pretrain.records.progress import clock, short

SHEET, PICTURE = "DATA_SHEET.md", "loss.png"


def write_card(story: Story, out: Path, name: str = "MODEL_CARD.md", library: str = "headway") -> Path:
    """Write the card, the data sheet and the curve into a folder; returns the path of the card.

    Args:
        name: of the card; `README.md` in a folder for the hub.
        library: that loads the weights.
    """
    out.mkdir(parents=True, exist_ok=True)
    pictured = draw_loss(story.rows, out / PICTURE)
    loader = jinja2.FileSystemLoader(Path(__file__).parent.parent / "templates")
    pages = jinja2.Environment(  # Markdown: cells are escaped one by one
        loader=loader,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        autoescape=False,
    )
    pages.filters.update(
        cell=cell, public=public, short=short, clock=clock, count=_count, public_name=public_name
    )
    told = {
        "story": story,
        "s": story.known,
        "front": front_matter(story, library),
        "library": library,
        "task": TASKS[story.setting("objective.name")][1],
        "distils": distils(story),
        "measures": measures(story),
        "machine": story.machine,
        "data": story.last("data"),
        "energy": story.known.get("energy"),
        "picture": PICTURE if pictured else None,
        "terms": _terms(story),
        "used": story.used,
    }
    publish(out / SHEET, pages.get_template("data_sheet.md.j2").render(told))
    publish(out / name, pages.get_template("model_card.md.j2").render(told))
    return out / name


def draw_loss(rows: list[dict[str, Any]], path: Path) -> bool:
    """A small picture of training and held-out loss; whether there was anything to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    steps, train, heldout = (column(rows, key) for key in ("step", "loss", "heldout_loss"))
    if not any(math.isfinite(value) for value in train):
        return False
    figure = Figure(figsize=(7.2, 2.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(steps, train, linewidth=1.2, label="train")
    kept = [i for i, value in enumerate(heldout) if math.isfinite(value)]
    if kept:
        axes.plot(steps[kept], heldout[kept], marker="o", markersize=3, linewidth=1.2, label="held out")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Software": None})
    return True


def _terms(story: Story) -> list[tuple[str, Any]]:
    """Parts of the loss that are learned from a teacher, with their weights."""
    prefix, suffix = "objective.distill.", ".weight"
    return [
        (name.removeprefix(prefix).removesuffix(suffix), value)
        for name, value, _ in story.settings
        if name.startswith(prefix) and name.endswith(suffix) and value
    ]


def _count(value: Any) -> str:
    """A count with commas; `not recorded` for None."""
    return "not recorded" if value is None else f"{value:,}"
