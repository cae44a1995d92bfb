"""`headway attention zoo`: small recipes trained with every mechanism that suits them, into one table and one plot.

Runs are as any others, under `runs/zoo`: what is complete is not trained again, what was interrupted goes on.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from headway.kernels.attention.registry import mechanism, words
from headway.launch import run
from headway.launch.console import console
from headway.launch.signals import StopRequest
from headway.pretrain.errors import Interrupted, JobError

COMMON = (
    "train.steps=200", "schedule.warmup=20", "optimizer.name=adamw", "optimizer.lr=2e-3", "train.compile=false",
    "precision=fp32", "train.eval_every=0", "checkpoint.every=100", "checkpoint.keep_last=1", "tracking.wandb=off",
)  # fmt: skip
"""Few tokens a step, for there are many runs; AdamW, whose steps cost less than Muon's at this size."""
RECIPES = {
    "gpt/tiny": ("train.global_batch=2", "data.heldout=0.01"),
    "bert/tiny": ("train.global_batch=3", "data.heldout=0.01"),
    "vit/tiny": ("train.global_batch=16",),
}
"""Recipe -> what is its own. Images are for mechanisms that need a grid of patches."""
COMPOSED = ("window+sink", "bigbird+entmax15")
"""Compositions that are trained beside the words."""
SIZES: dict[str, dict[str, int]] = {
    "window": {"window": 64},
    "dilated": {"window": 32},
    "local": {"block": 32},
    "strided": {"stride": 16},
    "fixed": {"stride": 16, "summaries": 2},
    "longformer": {"window": 64, "global_tokens": 8},
    "streaming": {"window": 64},
    "bigbird": {"block": 16, "global_tokens": 16},
    "performer": {"features": 64},
    "linformer": {"rank": 64},
    "topk": {"selected": 16},
    "routing": {"clusters": 8, "window": 32},
    "nsa": {"block": 16, "selected": 4, "window": 64},
    "moba": {"block": 32, "selected": 2},
    "span": {"span": 128},
    "hierarchical": {"block": 16},
    "logtime": {"block": 16},
}
"""Settings that suit rows of 128 and 256 tokens, of which the mechanisms' own would see all."""


ATTEMPTS: tuple[tuple[str, ...], ...] = (
    (),
    ("model.attention.qk_norm=false",),
    ("model.positions=learned",),
    ("model.positions=learned", "model.attention.qk_norm=false"),
)
"""What is changed where the recipe does not suit a mechanism, the least first."""


@dataclass(frozen=True)
class Member:
    """A recipe with a mechanism. `changed`: what it has unlike the recipe; `reason`: why it is not trained, if so."""

    recipe: str
    word: str
    changed: tuple[str, ...] = ()
    reason: str | None = None

    @property
    def name(self) -> str:
        return f"{self.recipe.split('/')[0]}-{self.word.replace('+', '-')}"


def pairs(recipes: Sequence[str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every recipe with every mechanism; images with those that need a grid of patches."""
    for recipe in recipes:
        for word in names:
            if recipe.startswith("vit") == ("images" in mechanism(word).supports):
                yield recipe, word


def sizes(word: str) -> list[str]:
    """Settings of a mechanism, or of several."""
    found = {key: value for part in word.split("+") for key, value in SIZES.get(part, {}).items()}
    return [f"model.attention.{key}={value}" for key, value in found.items()]


def train(recipe: str, word: str, place: Path, more: Sequence[str] = ()) -> Member:
    """Train a recipe with a mechanism, changed as little as it takes; or say why it cannot be.

    Raises:
        Interrupted: a signal asked to stop.
    """
    reason, stop = "", StopRequest()
    for changed in ATTEMPTS:
        member = Member(recipe, word, changed)
        sets = [*COMMON, *RECIPES[recipe], f"model.attention.mechanism={word}", *sizes(word), *changed, *more]
        try:
            run.train([recipe], [*sets, f"run.dir={place}", f"run.name={member.name}"], stop=stop)
        except JobError as e:
            reason = reason or str(e)
            if not (
                place / member.name / "checkpoints"
            ).exists():  # what it began with would stand in the way
                shutil.rmtree(place / member.name, ignore_errors=True)
        else:
            if stop.asked:
                raise Interrupted("the zoo stopped after a whole run; start it again to go on")
            return member
    return Member(recipe, word, reason=reason)


def zoo(recipes: Sequence[str], names: Sequence[str], folder: str) -> None:
    """Train what is not trained yet; print and write the table and the plot after every run."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    for recipe, word in pairs(recipes or list(RECIPES), names or [*words(), *COMPOSED]):
        member = train(recipe, word, place)
        results.append(result(member, place / member.name))
        (place / "zoo.json").write_text(json.dumps(results, indent=2))
    draw(results, place / "zoo.png")
    console().print(table(results))
    print(f"\n{place / 'zoo.json'}, {place / 'zoo.png'}")


def result(member: Member, folder: Path) -> dict[str, Any]:
    """What a run reached."""
    facts: dict[str, Any] = {"recipe": member.recipe, "word": member.word, "reason": member.reason}
    if member.reason is not None:
        return facts
    summary = json.loads((folder / "summary.json").read_text())
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    seconds = [step["step_seconds"] for step in steps if "step_seconds" in step]
    return facts | {
        "changed": list(member.changed),
        "heldout_loss": summary["heldout_loss"],
        "step_seconds": statistics.median(seconds),
        "first_loss": next(step["loss"] for step in steps if "loss" in step),
    }


def table(results: Sequence[dict[str, Any]]) -> Table:
    """Of each recipe the best first; then what does not suit it, and why."""
    found = Table(box=None, header_style="bold")
    for title in ("recipe", "mechanism", "held-out loss", "ms a step", "times dense", "changed"):
        found.add_column(title, overflow="fold")
    for recipe in dict.fromkeys(r["recipe"] for r in results):
        mine = [r for r in results if r["recipe"] == recipe and r["reason"] is None]
        dense = next((r["step_seconds"] for r in mine if r["word"] == "dense"), None)
        for r in sorted(mine, key=lambda r: r["heldout_loss"]):
            ratio = f"{r['step_seconds'] / dense:.2f}" if dense else ""
            milliseconds = f"{r['step_seconds'] * 1e3:.0f}"
            changed = ", ".join(r["changed"])
            found.add_row(recipe, r["word"], f"{r['heldout_loss']:.4f}", milliseconds, ratio, changed)
        for r in results:
            if r["recipe"] == recipe and r["reason"] is not None:
                found.add_row(recipe, r["word"], "", "", "", r["reason"], style="dim")
    return found


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Held-out loss against the time of a step, a point for every mechanism."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    done = [r for r in results if r["reason"] is None]
    recipes = list(dict.fromkeys(r["recipe"] for r in done))
    figure = Figure(figsize=(9 * max(1, len(recipes)), 8), layout="constrained")
    FigureCanvasAgg(figure)
    for i, recipe in enumerate(recipes):
        panel = figure.add_subplot(1, len(recipes), i + 1)
        mine = [r for r in done if r["recipe"] == recipe]
        panel.scatter([r["step_seconds"] * 1e3 for r in mine], [r["heldout_loss"] for r in mine], s=14)
        panel.set_xscale("log")
        panel.margins(x=0.15)
        panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
        panel.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel("milliseconds a step")
        panel.set_ylabel("held-out loss")
        panel.set_title(recipe)
        panel.grid(visible=True, alpha=0.2)
    figure.draw_without_rendering()  # where points lie is known from here on
    for panel, recipe in zip(figure.axes, recipes, strict=True):
        _name(panel, [r for r in done if r["recipe"] == recipe])
    figure.savefig(path, dpi=100)


def _name(panel: Any, results: Sequence[dict[str, Any]]) -> None:
    """Names beside their points, each where it hides no other, as far as there is room."""
    taken: list[tuple[float, float, float, float]] = []
    for r in sorted(results, key=lambda r: r["heldout_loss"]):
        place = (r["step_seconds"] * 1e3, r["heldout_loss"])
        x, y = panel.transData.transform(place)
        width, height = 6.0 * len(r["word"]), 11.0  # pixels, about
        spots = [(dx, dy) for dy in (-4, 6, -14, 16, -24, 26) for dx in (5, -5 - width)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in spots]
        free = [
            not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in taken) for a in boxes
        ]
        best = free.index(True) if True in free else 0
        taken += [boxes[best], (x - 3, y - 3, x + 3, y + 3)]
        offset = tuple(d * 0.72 for d in spots[best])  # points
        panel.annotate(r["word"], place, fontsize=7, xytext=offset, textcoords="offset points")
