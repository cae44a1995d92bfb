"""`report.html`: a whole run on one page that needs no network, and `summary.json`, its final numbers."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from headway.pretrain.energy.account import account
from headway.pretrain.files import publish
from headway.pretrain.records.attention_maps import AttentionMaps, draw_heads
from headway.pretrain.records.charts import column, learned_charts, loss_chart, small_charts
from headway.pretrain.records.map_pairs import MapPairs, draw_pairs
from headway.pretrain.records.metrics import plain, read_metrics
from headway.pretrain.records.progress import clock, short
from headway.pretrain.records.records import read_events

OURS = "this model"
"""Name of the trained model among the entries of a score."""
_DERIVED = {"status", "steps", "tokens", "tokens_per_second", "mfu", "memory_gib", "energy"}
_LASTING = {"parameters", "device", "devices", "precision", "precision_reason", "peak_flops", "peak_source",
            "environment"}  # fmt: skip
_QUIET = {"eval", "checkpoint", "data", "meter", "energy"}
"""Kinds of events that the page shows in another way, or not at all."""


def write_report(
    run_dir: Path,
    job: Mapping[str, Any],
    maps: AttentionMaps | None = None,
    summary: Mapping[str, Any] | None = None,
    painted: str | None = None,
    pairs: MapPairs | None = None,
) -> Path:
    """Write `summary.json` and `report.html` of a run, finished or not; returns the path of the page.

    Args:
        job: the resolved job. A leaf is a value, or `{"value": ..., "origin": ...}` as `job.yaml` keeps it.
        maps: attention of the trained model on a sample text.
        summary: what only the end of a run knows; each may be missing, and what an earlier report of this run
            knew stays: `status`, `train_loss`, `heldout_loss`, `bits_per_byte`, `tokens`, `seconds`, `parameters`,
            `device`, `devices`, `precision`, `precision_reason`, `peak_flops`, `peak_source`, `prompt`,
            `completion`, and `score`: `title`, `note`, `lower` (is better) and `entries`, (name, value) each, this
            model first.
        painted: a picture of masked, reconstructed and true images, as a data URI.
        pairs: attention of a student and of its teacher on that sample.
    """
    rows, events = read_metrics(run_dir), read_events(run_dir)
    settings = list(flatten(job))
    values = {key: value for key, value, _ in settings}
    known = {"environment": environment(), **know(run_dir, rows, events, values)}
    known |= {k: v for k, v in (summary or {}).items() if v is not None}
    publish(run_dir / "summary.json", json.dumps(plain(known), indent=1, ensure_ascii=False) + "\n")
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    page = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters.update(short=short, si=_si, clock=clock, show=show, size=_size, date=_date)
    html = page.get_template("report.html.j2").render(
        name=run_dir.resolve().name,
        s={k: v for k, v in known.items() if not (isinstance(v, float) and math.isnan(v))},
        facts=facts(values, known),
        bars=bars(known),
        painted=painted,
        loss=loss_chart(rows),
        charts=small_charts(rows),
        learned=learned_charts(rows),
        settings=settings,
        heads=draw_heads(maps) if maps else None,
        pairs=draw_pairs(pairs) if pairs else None,
        checkpoints=checkpoints(run_dir),
        events=[e for e in events if e.get("kind") not in _QUIET][-50:],
        skipped=sum(bool(row.get("skipped")) for row in rows),
        broken=[row["step"] for row in rows if not math.isfinite(row.get("loss", 0.0))],
        written=time.time(),
    )
    publish(run_dir / "report.html", html)
    return run_dir / "report.html"


def know(
    run_dir: Path, rows: list[dict[str, Any]], events: list[dict[str, Any]], values: Mapping[str, Any]
) -> dict[str, Any]:
    """What a run's records tell of it, and what an earlier report knew that still holds.

    Args:
        values: settings of the job by dotted name.
    """
    derived, saved = derive(rows, events), _saved(run_dir)
    if energy := account(rows, events, values):
        derived["energy"] = energy
    if saved.get("steps") != derived.get("steps"):  # the run went on: what its earlier end measured is stale
        saved = {k: saved[k] for k in _LASTING & saved.keys()} | _baselines(saved)
    return {**derived, **{k: v for k, v in saved.items() if k not in _DERIVED}}


def derive(rows: list[dict[str, Any]], events: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that follow from the metrics alone."""
    ends = [e for e in events if e.get("kind") in ("start", "resume", "end")]
    running = not ends or ends[-1]["kind"] != "end"
    found: dict[str, Any] = {"status": "running" if running else str(ends[-1].get("status"))}
    if not rows:
        return found
    tokens, seconds = column(rows, "tokens"), column(rows, "step_seconds")
    found |= {
        "steps": rows[-1]["step"],
        "tokens": int(np.nansum(tokens)),
        "seconds": float(np.nansum(seconds)),
    }
    for name, key in (("tokens_per_second", "tokens_per_second"), ("mfu", "mfu")):
        values = column(rows, key)
        if np.isfinite(values).any():
            found[name] = float(np.nanmedian(values))
    memory, loss, heldout = (column(rows, key) for key in ("memory_gib", "loss", "heldout_loss"))
    if np.isfinite(memory).any():
        found["memory_gib"] = float(np.nanmax(memory))
    if np.isfinite(loss[-10:]).any():
        found["train_loss"] = float(np.nanmean(loss[-10:]))
    if np.isfinite(heldout).any():
        found["heldout_loss"] = float(heldout[np.isfinite(heldout)][-1])
    return found


def flatten(job: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """Dotted key, value and origin of every setting; the origin is empty where the job does not say."""
    for key, value in job.items():
        if isinstance(value, Mapping) and set(value) == {"value", "origin"}:
            yield prefix + key, value["value"], str(value["origin"])
        elif isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value, ""


def facts(values: Mapping[str, Any], summary: Mapping[str, Any]) -> list[str]:
    """The line under the name: what was trained."""
    found = []
    if values.get("model.family"):
        found.append(str(values["model.family"]).upper())
    if summary.get("parameters"):
        found.append(f"{short(summary['parameters'])} parameters")
    if values.get("model.layers") and values.get("model.hidden"):
        found.append(f"{values['model.layers']} layers × {values['model.hidden']}")
    if values.get("model.family") == "vit":
        side = values.get("data.images.size")
        found.append(f"images of {side} × {side}")
    elif values.get("data.seq_len"):
        found.append(f"{values['data.seq_len']:,} tokens of context")
    if values.get("train.global_batch"):
        found.append(f"batches of {values['train.global_batch']} rows")
    if values.get("optimizer.name"):
        found.append(str(values["optimizer.name"]))
    return found


def bars(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of the score, with lengths in proportion."""
    entries = (summary.get("score") or {}).get("entries", [])
    found = [
        {"name": name, "value": value, "ours": name == OURS}
        for name, value in entries
        if isinstance(value, int | float) and math.isfinite(value)
    ]
    longest = max((bar["value"] for bar in found), default=1) or 1
    return [{**bar, "share": 100 * bar["value"] / longest} for bar in found]


def _baselines(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The score less this model's own number: baselines belong to the data, and stay."""
    if not saved.get("score"):
        return {}
    entries = [entry for entry in saved["score"]["entries"] if entry[0] != OURS]
    return {"score": {**saved["score"], "entries": entries}}


def checkpoints(run_dir: Path) -> list[dict[str, Any]]:
    """Checkpoints that lie in the run folder: name, bytes, time, and whether `LATEST` names it."""
    folder = run_dir / "checkpoints"
    latest = folder / "LATEST"
    name = latest.read_text().strip() if latest.is_file() else latest.resolve().name
    found = []
    for path in sorted(folder.glob("step_*")) if folder.is_dir() else []:
        if path.is_dir():
            size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
            mark = Path(name).name == path.name
            found.append({"name": path.name, "bytes": size, "time": path.stat().st_mtime, "latest": mark})
    return found


def environment() -> dict[str, str]:
    """Where the run happened, as far as it explains its numbers; no host name, no user, no paths."""
    import torch

    found = {
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "host cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
    }
    if torch.cuda.is_available():
        found["GPUs"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name()}"
        found["CUDA"] = str(torch.version.cuda)
    return found


def show(value: Any) -> str:
    """A setting as the recipe would spell it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _saved(run_dir: Path) -> dict[str, Any]:
    """What an earlier report knew."""
    try:
        saved = json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return saved


def _si(number: float) -> str:
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.3g} "


def _size(count: float) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:.0f} B"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
