"""The end of a run: its score beside baselines, a sample of what it does, the report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.markup import escape
from rich.table import Table

from headway.launch.assemble import Parts
from headway.launch.compare import compare
from headway.launch.console import console
from headway.launch.energy import RunEnergy
from headway.launch.scores import score
from headway.pretrain.data.store import TokenStore
from headway.pretrain.energy.account import in_words
from headway.pretrain.engine import Batch
from headway.pretrain.evaluate import bits_per_byte, heldout_rows
from headway.pretrain.generate import generate
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.causal import CausalLM
from headway.pretrain.objectives.mae import MaskedAutoencoder
from headway.pretrain.recipe import Resolved, as_plain, leaves
from headway.pretrain.records.attention_maps import AttentionMaps
from headway.pretrain.records.map_pairs import MapPairs
from headway.pretrain.records.pictures import draw_reconstructions
from headway.pretrain.records.records import Recorder
from headway.pretrain.records.report import write_report

COMPLETION_TOKENS = 96
MAP_TOKENS = 48
"""Longest text whose attention maps are drawn: beyond it a cell is smaller than a pixel."""
PAINTED = 10
"""Held-out images whose reconstruction is drawn."""


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


@dataclass(frozen=True)
class Shown:
    """What a model does with a sample.

    Attributes:
        completion: of the prompt.
        maps: attention.
        painted: reconstructed images.
        pairs: attention beside the teacher's.
    """

    completion: str | None = None
    maps: AttentionMaps | None = None
    painted: str | None = None
    pairs: MapPairs | None = None


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
    return Finished(folder, report(parts, folder, {**values, "status": "done"}))


def report(parts: Parts, folder: Path, values: dict | None = None) -> dict:
    """Write `summary.json` and `report.html`; returns the summary. Collective; the first rank writes."""
    shown = show(parts)
    if not parts.world.main:
        return {}
    hardware = parts.hardware
    summary = {
        **(values or {}),
        "parameters": sum(p.numel() for p in parts.weights()),
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


def show(parts: Parts) -> Shown:
    """What people look at, each where the objective has it; collective."""
    objective = parts.engine.whole()
    if objective is None:
        if parts.world.main:
            print("  the report has no samples or maps: the stages' weights are too large for one rank")
        return Shown()
    batch = beginning(parts)
    completion, maps = complete(parts, objective), draw_maps(parts, objective, batch)
    return Shown(completion, maps, paint(parts, objective), compare(parts, objective, batch, maps))


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


def complete(parts: Parts, objective: Objective) -> str | None:
    """A sampled continuation of the prompt, of causal models; the same on every rank."""
    tokenizer, job = parts.dataset.tokenizer, parts.job
    if not isinstance(objective, CausalLM) or tokenizer is None:
        return None
    prompt = [tokenizer.separator, *tokenizer.encode(job.tracking.prompt)]
    tokens = torch.tensor([prompt], device=parts.world.device)
    new = generate(
        objective,
        tokens,
        COMPLETION_TOKENS,
        context=job.data.seq_len,
        temperature=0.7,
        top_k=50,
        seed=job.train.seed,
    )
    pieces = new[0, len(prompt) :].tolist()
    if tokenizer.separator in pieces:
        pieces = pieces[: pieces.index(tokenizer.separator)]
    return tokenizer.decode(pieces)


def example(parts: Parts, count: int) -> Batch:
    """The first samples, held-out ones if there are any, on the device."""
    if parts.dataset.heldout:
        samples = parts.dataset.heldout[0]
        rows = heldout_rows(samples, np.arange(min(count, len(samples))))
    else:
        rows = parts.loader.stream.rows(np.arange(count))
    batch = parts.engine.objective.collate(rows)
    return {name: tensor.to(parts.world.device) for name, tensor in batch.items()}


def beginning(parts: Parts) -> Batch:
    """The beginning of a text, or an image."""
    batch = example(parts, 1)
    for name in ("tokens", "targets", "documents", "segments"):
        if name in batch:
            batch[name] = batch[name][:, :MAP_TOKENS]
    return batch


def draw_maps(parts: Parts, objective: Objective, batch: Batch) -> AttentionMaps | None:
    """Attention of every head on one sample, if there is any; collective."""
    tokenizer = parts.dataset.tokenizer
    maps = objective.attention_maps(batch)[:, 0].float().cpu().numpy().astype(np.float32)
    if len(maps) == 0:
        return None
    if tokenizer is None:
        first = parts.job.model.vision.prefix_tokens
        names = ["<class>", "<distill>"][:first] + [f"patch {i} " for i in range(maps.shape[-1] - first)]
        return AttentionMaps(names, maps)
    return AttentionMaps([spell(parts, int(token)) for token in batch["tokens"][0]], maps)


def spell(parts: Parts, token: int) -> str:
    """A token as people read it."""
    tokenizer, specials = parts.dataset.tokenizer, parts.dataset.specials
    assert tokenizer is not None
    assert specials is not None
    if token == tokenizer.separator:
        return "<end>"
    if token in specials.sentinels:
        return f"<{specials.sentinels.index(token)}>"
    named = {i: name for name, i in specials.ids.items()}
    return f"<{named[token]}>" if token in named else tokenizer.decode([token])


def paint(parts: Parts, objective: Objective) -> str | None:
    """A picture of held-out images, masked, reconstructed and true, of masked autoencoders; collective."""
    if not isinstance(objective, MaskedAutoencoder):
        return None
    batch = example(parts, PAINTED)
    seen, whole = objective.reconstruct(batch)
    images = parts.job.data.images
    levels = [np.asarray(values, dtype=np.float32).reshape(-1, 1, 1) for values in (images.mean, images.std)]
    shown = [part.float().cpu().numpy() * levels[1] + levels[0] for part in (seen, whole, batch["pixels"])]
    return draw_reconstructions(*shown)
