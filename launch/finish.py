"""The end of a run: its score beside baselines, a sample of what it does, the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from headway.launch.assemble import Parts
from headway.launch.console import console
from headway.launch.energy import RunEnergy
from headway.launch.samples import Shown, gallery, show
from headway.launch.scores import score
from headway.pretrain.data.store import TokenStore
from headway.pretrain.energy.account import in_words
from headway.pretrain.evaluate import bits_per_byte
from headway.pretrain.recipe import Resolved, as_plain, leaves
from headway.pretrain.records.records import Recorder
from headway.pretrain.records.report import write_report


@dataclass(frozen=True)
class Finished:
    """What the end of a run knows."""

    folder: Path
    summary: dict

    @classmethod
    def read(cls, folder: Path) -> Finished:
        return cls(folder, json.loads((folder / "summary.json").read_text(encoding="utf-8")))

    def show(self, title: str) -> None:
        """Print it for a person."""
        s, out = self.summary, console()
        table = Table(box=None, show_header=False, pad_edge=False)
        for label, key in (("train loss", "train_loss"), ("held-out loss", "heldout_loss")):
            if s.get(key) is not None:
                table.add_row(label, f"{s[key]:.4f}")
        if found := s.get("score"):
            for i, (name, value) in enumerate(found["entries"]):
                first = f"[bold]{value:.3f}[/bold]  {found['note']}"
                table.add_row(found["title"] if i == 0 else f"  {name}", first if i == 0 else f"{value:.3f}")
        if energy := s.get("energy"):
            table.add_row("energy", escape(in_words(energy)))
        out.print(f"\n{title}")
        out.print(table)
        if s.get("completion") is not None:
            out.print("\ncompletion:", style="dim")
            out.print(s["prompt"] + s["completion"], markup=False)
        out.print(f"\nreport: {self.folder / 'report.html'}")


def heldout_values(parts: Parts, limit: int | None) -> dict[str, float]:
    """Held-out loss in nats and the objective's metrics; of text that is read whole also bits per byte.

    Nothing if nothing is held out. Collective.
    """
    if not parts.dataset.heldout:
        return {}
    sums = parts.evaluator.sums(limit)
    values = {f"heldout_{name}": total / max(count, 1) for name, (total, count) in sums.items()}
    prepared = parts.dataset.prepared
    if limit is None and parts.job.objective.name == "causal" and prepared:
        stores = (TokenStore(prefix) for prefix in prepared.heldout)
        if utf8_bytes := sum(store.facts.get("utf8_bytes", 0) for store in stores):
            values["bits_per_byte"] = bits_per_byte(sums["loss"][0], utf8_bytes)
    return values


def finish(parts: Parts, folder: Path, recorder: Recorder, energy: RunEnergy) -> Finished:
    """Evaluate on all held-out rows, score, write the report; collective."""
    values: dict = heldout_values(parts, None)
    if values:
        recorder.event("eval", **values)
    for source in parts.dataset.images:
        if source.skipped:
            first = "; ".join(source.skipped_first)
            recorder.event(
                "warning", message=f"left out {source.skipped} broken images of {source.name}: {first}"
            )
    if parts.world.main and (found := score(parts, values)):
        values["score"] = found.plain()
    energy.end()
    shown = show(parts)
    recorder.show(gallery(parts, shown, parts.job.train.steps))
    return Finished(folder, report(parts, folder, {**values, "status": "done"}, shown))


def report(parts: Parts, folder: Path, values: dict | None = None, shown: Shown | None = None) -> dict:
    """Write `summary.json` and `report.html`; returns the summary. Collective; the first rank writes."""
    shown = shown or show(parts)
    if not parts.world.main:
        return {}
    hardware = parts.hardware
    summary = {
        **(values or {}),
        "parameters": parts.engine.parameters(),
        "device": str(parts.world.device),
        "devices": parts.world.size,
        "precision": hardware.precision,
        "precision_reason": hardware.precision_reason,
        "peak_flops": hardware.peak,
        "peak_source": hardware.peak_source,
    }
    if shown.completion is not None:
        summary |= {"prompt": parts.job.tracking.prompt, "completion": shown.completion}
    write_report(folder, with_origins(parts.resolved), shown.maps, summary, shown.painted, shown.pairs)
    return Finished.read(folder).summary


def with_origins(resolved: Resolved) -> dict:
    """The job as a tree whose leaves carry where they came from."""
    tree: dict = {}
    for name, value in leaves(resolved.job):
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        plain = [as_plain(v) for v in value] if isinstance(value, list) else value
        place[key] = {"value": plain, "origin": resolved.origins.get(name, "default")}
    return tree
