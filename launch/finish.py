"""The end of a run: held-out bits per byte beside general compressors, a completion, the report."""

from __future__ import annotations

import json
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from headway.launch.assemble import Parts
from headway.launch.console import console
from headway.pretrain.data.build import heldout_bytes
from headway.pretrain.evaluate import bits_per_byte
from headway.pretrain.generate import generate
from headway.pretrain.recipe import leaves
from headway.pretrain.records.attention_maps import AttentionMaps
from headway.pretrain.records.records import Recorder
from headway.pretrain.records.report import write_report

COMPLETION_TOKENS = 96
MAP_TOKENS = 48
"""Longest text whose attention maps are drawn: beyond it a cell is smaller than a pixel."""


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
                table.add_row(label, f"{s[key]:.4f} nats a token")
        if s.get("bits_per_byte") is not None:
            size = f"on the same {s['heldout_bytes']:,} held-out bytes"
            table.add_row("bits per byte", f"[bold]{s['bits_per_byte']:.3f}[/bold]  {size}")
            table.add_row("  zlib -9", f"{s['zlib_bits_per_byte']:.3f}")
            table.add_row("  xz -9", f"{s['xz_bits_per_byte']:.3f}")
        out.print(f"\n{title}")
        out.print(table)
        out.print("\ncompletion:", style="dim")
        out.print(s["prompt"] + s["completion"], markup=False)
        out.print(f"\nreport: {self.folder / 'report.html'}")


def heldout_loss(parts: Parts, limit: int | None) -> dict[str, float]:
    """Held-out loss in nats a token; over all rows also bits per byte. Nothing if nothing is held out."""
    if not parts.corpus.heldout:
        return {}
    nats, tokens = parts.evaluator.loss(limit)
    values = {"heldout_loss": nats / max(tokens, 1)}
    utf8_bytes = parts.corpus.heldout_utf8_bytes
    if limit is None and utf8_bytes:
        values["bits_per_byte"] = bits_per_byte(nats, utf8_bytes)
    return values


def compressors(parts: Parts) -> dict[str, float]:
    """Bits per byte of zlib -9 and xz -9 on the very bytes that the model was scored on."""
    prepared = parts.corpus.prepared
    text = heldout_bytes(prepared.heldout, prepared.tokenizer)
    return {
        "heldout_bytes": len(text),
        "zlib_bits_per_byte": 8 * len(zlib.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }


def finish(parts: Parts, folder: Path, recorder: Recorder) -> Finished:
    """Evaluate on all held-out rows, complete the prompt, write the report; collective."""
    values: dict = heldout_loss(parts, None)
    if values:
        recorder.event("eval", **values)
    if parts.world.main and "bits_per_byte" in values:
        values |= compressors(parts)
    return Finished(folder, report(parts, folder, {**values, "status": "done"}))


def report(parts: Parts, folder: Path, values: dict | None = None) -> dict:
    """Write `summary.json` and `report.html`; returns the summary. Collective; the first rank writes."""
    completion, maps = complete(parts), draw_maps(parts)
    if not parts.world.main:
        return {}
    hardware = parts.hardware
    summary = {
        **(values or {}),
        "parameters": sum(p.numel() for p in parts.engine.objective.parameters()),
        "device": str(parts.world.device),
        "devices": parts.world.size,
        "precision": hardware.precision,
        "precision_reason": hardware.precision_reason,
        "peak_flops": hardware.peak,
        "peak_source": hardware.peak_source,
        "prompt": parts.job.tracking.prompt,
        "completion": completion,
    }
    write_report(folder, with_origins(parts), maps, summary)
    return Finished.read(folder).summary


def with_origins(parts: Parts) -> dict:
    """The job as a tree whose leaves carry where they came from."""
    tree: dict = {}
    for name, value in leaves(parts.job):
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        plain = [getattr(v, "path", v) for v in value] if isinstance(value, list) else value
        place[key] = {"value": plain, "origin": parts.resolved.origins.get(name, "default")}
    return tree


def complete(parts: Parts) -> str:
    """A sampled continuation of the prompt; the same on every rank."""
    tokenizer, job = parts.corpus.prepared.tokenizer, parts.job
    prompt = [tokenizer.separator, *tokenizer.encode(job.tracking.prompt)]
    tokens = torch.tensor([prompt], device=parts.world.device)
    new = generate(
        parts.engine.objective,
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


def draw_maps(parts: Parts) -> AttentionMaps:
    """Attention of every head on the beginning of a held-out text, or on the prompt."""
    tokenizer = parts.corpus.prepared.tokenizer
    tokens = [tokenizer.separator, *tokenizer.encode(parts.job.tracking.prompt)]
    if parts.corpus.heldout:
        tokens = parts.corpus.heldout[0].rows([0])["tokens"][0].tolist()
    tokens = tokens[: min(MAP_TOKENS, parts.job.data.seq_len)]
    maps = parts.engine.objective.attention_maps(torch.tensor([tokens], device=parts.world.device))
    names = ["<end>" if t == tokenizer.separator else tokenizer.decode([t]) for t in tokens]
    return AttentionMaps(names, maps[:, 0].float().cpu().numpy().astype(np.float32))
