"""The curves that a report shows, from the rows of `metrics.jsonl`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headway.pretrain.records.figures import SECOND, Curve, draw

Rows = list[dict[str, Any]]

HELDOUT = "heldout_"
"""Before the name of a metric of an evaluation."""
PARTS = {
    "task_loss": ("The task's own loss", "without the teacher"),
    "soft_loss": ("Soft targets", "divergence from the teacher's predictions"),
    "learned/attention": ("Attention maps", "divergence from the teacher's"),
    "learned/across": ("Cross-attention maps", "divergence from the teacher's"),
    "learned/relations": ("Relations", "divergence from the teacher's"),
    "learned/rows": ("Rows of attention maps", "how hard they are to tell apart"),
    "learned/inputs": ("Embeddings", "distance from the teacher's"),
    "learned/states": ("Hidden states", "distance from the teacher's"),
    "learned/final": ("Last hidden states", "distance from the teacher's"),
    "contrast": ("Representations", "how hard they are to tell apart"),
}
"""Metrics of what is learned from a teacher: title and note."""
TOWERS = {".0": "encoder", ".1": "decoder"}
"""What the names of metrics end on where a model has two."""


def column(rows: Rows, key: str) -> np.ndarray:
    """A metric of all rows, NaN where a row has none."""
    values = (row.get(key, math.nan) for row in rows)
    return np.array([v if isinstance(v, int | float) else math.nan for v in values], dtype=float)


def loss_chart(rows: Rows) -> Any:
    """Training loss, and held-out loss where it was taken."""
    steps = [row["step"] for row in rows]
    curves = [Curve("train", steps, column(rows, "loss").tolist(), smooth=True)]
    curves.append(Curve("held-out", steps, column(rows, "heldout_loss").tolist(), SECOND, points=True))
    return draw(curves, "loss", width=1000, height=340)


def small_charts(rows: Rows) -> list[dict[str, Any]]:
    """The other curves: title, note, picture."""
    wanted = [
        ("lr", "Learning rate", "", True),
        ("grad_norm", "Gradient norm", "before clipping", False),
        ("tokens_per_second", "Throughput", "tokens a second", True),
        ("memory_gib", "Memory", "GiB, peak so far", True),
    ]
    steps, found = [row["step"] for row in rows], []
    for key, title, note, zero in wanted:
        smooth = key in ("grad_norm", "tokens_per_second")
        curve = Curve(title.lower(), steps, column(rows, key).tolist(), smooth=smooth)
        picture = draw([curve], key, width=480, height=190, zero=zero)
        if picture:
            found.append({"title": title, "note": note, "picture": picture})
    return found


def learned_charts(rows: Rows) -> list[dict[str, Any]]:
    """What is learned from a teacher, each part of the loss in training and on held-out data: title, note, picture."""
    steps, found = [row["step"] for row in rows], []
    keys = {key.removeprefix(HELDOUT) for row in rows for key in row}
    for name, (title, note) in PARTS.items():
        for ending in ("", *TOWERS):
            if (key := name + ending) not in keys:
                continue
            curves = [
                Curve("train", steps, column(rows, key).tolist(), smooth=True),
                Curve("held-out", steps, column(rows, HELDOUT + key).tolist(), SECOND, points=True),
            ]
            if picture := draw(curves, key, width=480, height=190, zero=True):
                tower = f"{TOWERS[ending]}, " if ending else ""
                found.append({"title": title, "note": tower + note, "picture": picture})
    return found
