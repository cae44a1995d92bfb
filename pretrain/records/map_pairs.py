"""Attention maps of a student beside those of its teacher, head by head, and how far they are apart.

Both are rows of weights that sum to 1: q the student's, p the teacher's, over the same keys. A row's divergences, in
nats (Lin 1991, equations 2.1 and 4.1):

    KL = sum_j p_j log(p_j / q_j)            infinite where the teacher looks at what the student gives no weight
    JS = (KL(p || m) + KL(q || m)) / 2,      m = (p + q) / 2; at most log 2

P pairs of layers, H heads of the student, S positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headway.pretrain.records.attention_maps import draw_map, readable

LAYERS, HEADS = 6, 12
"""Of so many at most pictures are shown."""
ROWS, COLUMNS = 48, 32
"""Of so many layers and heads at most the table tells the divergence."""
CELLS = 500_000
"""Of all pictures together; what goes beyond is cut off their ends."""

Array = NDArray[np.floating]


@dataclass(frozen=True)
class MapPairs:
    """What a student and its teacher attend to in one text or image.

    Attributes:
        tokens: the S places, as people read them.
        layers: (the student's layer, the teacher's) of each of the P pairs, from 0.
        heads: the teacher's heads that each of the student's H heads is compared with, from 0.
        student: [P, H, S, S], rows are queries.
        teacher: likewise; the mean over `heads`.
        counted: bool [S], which rows count; all if None. Rows in which a model sees nothing never do.
        learned: whether maps were a part of the loss.
        notes: what is not there, and why; sentences.
    """

    tokens: list[str]
    layers: list[tuple[int, int]]
    heads: list[list[int]]
    student: Array
    teacher: Array
    counted: NDArray[np.bool_] | None = None
    learned: bool = True
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = (len(self.layers), len(self.heads), len(self.tokens), len(self.tokens))
        for name, maps in (("student", self.student), ("teacher", self.teacher)):
            if maps.shape != shape:
                raise ValueError(f"{name} is {maps.shape}, expected {shape}: pairs, heads, places, places")

    @classmethod
    def none(cls, *notes: str) -> MapPairs:
        """Nothing to compare, and why."""
        nothing = np.zeros((0, 0, 0, 0))
        return cls([], [], [], nothing, nothing, notes=notes)


def divergences(
    teacher: Array, student: Array, counted: NDArray[np.bool_] | None = None
) -> tuple[Array, Array]:
    """KL(teacher || student) and Jensen-Shannon in nats, each the mean over the rows that count, [...].

    Args:
        teacher, student: [..., S, S], rows are queries; what they sum to does not matter, unless it is 0.
        counted: bool [S], which rows count; all if None.

    Returns:
        NaN where no row counts, or a weight is below 0 (differential attention has such).
    """
    p, q = teacher.astype(np.float64), student.astype(np.float64)
    total_p, total_q = p.sum(-1, keepdims=True), q.sum(-1, keepdims=True)
    counts = (total_p > 0)[..., 0] & (total_q > 0)[..., 0]
    counts = counts if counted is None else counts & counted
    p, q = p / np.where(total_p > 0, total_p, 1), q / np.where(total_q > 0, total_q, 1)
    middle = (p + q) / 2
    kl, js = _relative(p, q), (_relative(p, middle) + _relative(q, middle)) / 2
    over = np.where(counts.any(-1), counts.sum(-1), np.nan)
    first, second = (np.where(counts, rows, 0).sum(-1) / over for rows in (kl, js))
    return first, second


def _relative(p: Array, q: Array) -> Array:
    """KL(p || q) of rows; what p does not look at adds nothing, a weight below 0 makes it NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        each = np.where(p == 0, 0, p * (np.log(p) - np.log(q)))
    return each.sum(-1)


def draw_pairs(pairs: MapPairs) -> dict[str, Any]:
    """Pictures and numbers, for the template."""
    kl, js = divergences(pairs.teacher, pairs.student, pairs.counted)
    layers, heads = spread(len(pairs.layers), LAYERS), spread(len(pairs.heads), HEADS)
    size = len(pairs.tokens)
    shown = min(size, max(1, int((CELLS / max(1, 2 * len(layers) * len(heads))) ** 0.5)))
    return {
        "tokens": [readable(token) for token in pairs.tokens[:shown]],
        "table": _table(pairs, kl, js, set(layers), set(heads)),
        "mean": {"kl": amount(kl.mean()), "js": amount(js.mean())} if kl.size else None,
        "layers": [_layer(pairs, kl, js, i, heads, shown) for i in layers],
        "learned": pairs.learned,
        "several": any(len(theirs) > 1 for theirs in pairs.heads),
        "notes": [*pairs.notes, *_left_out(pairs, layers, heads, shown)],
    }


def spread(count: int, most: int) -> list[int]:
    """All of `count` numbers from 0, or `most` of them evenly spaced, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))})


def _table(pairs: MapPairs, kl: Array, js: Array, layers: set[int], heads: set[int]) -> dict[str, Any]:
    """Divergence of every head, as far as there is room, and of every layer; cells with pictures name them."""
    columns = spread(len(pairs.heads), COLUMNS)
    most = max(float(np.max(kl, initial=0, where=np.isfinite(kl))), 1e-12)

    def cell(i: int, h: int) -> dict[str, Any]:
        share = np.nan_to_num(kl[i, h] / most, posinf=1.0)
        return {
            "kl": amount(kl[i, h]),
            "js": amount(js[i, h]),
            "share": float(share),
            "link": _name(i, h) if i in layers and h in heads else "",
        }

    rows = [
        {
            "name": _names(pairs.layers[i]),
            "cells": [cell(i, h) for h in columns],
            "mean": amount(kl[i].mean()),
        }
        for i in spread(len(pairs.layers), ROWS)
    ]
    return {"heads": [h + 1 for h in columns], "rows": rows}


def _layer(pairs: MapPairs, kl: Array, js: Array, i: int, heads: list[int], shown: int) -> dict[str, Any]:
    """The pictures of a pair of layers."""
    ours, theirs = pairs.layers[i]
    found = [
        {
            "name": _name(i, h),
            "head": h + 1,
            "theirs": _numbered("head", [n + 1 for n in pairs.heads[h]]),
            "student": draw_map(pairs.student[i, h, :shown, :shown]),
            "teacher": draw_map(pairs.teacher[i, h, :shown, :shown]),
            "kl": amount(kl[i, h]),
            "js": amount(js[i, h]),
        }
        for h in heads
    ]
    return {"ours": ours + 1, "theirs": theirs + 1, "heads": found}


def _left_out(pairs: MapPairs, layers: list[int], heads: list[int], shown: int) -> list[str]:
    """What the page has no room for."""
    found = []
    for what, there, here, most in (
        ("layers", len(pairs.layers), len(layers), ROWS),
        ("heads", len(pairs.heads), len(heads), COLUMNS),
    ):
        if there > here:
            text = f"Pictures are of {here} of the {there} {what}, evenly spaced"
            found.append(text + (f"; the table has {most} of them." if there > most else "."))
    if shown < len(pairs.tokens):
        found.append(
            f"Pictures show the first {shown} of {len(pairs.tokens)} places; the divergence is of all."
        )
    return found


def amount(value: float) -> str:
    """A divergence, to three digits."""
    if not np.isfinite(value):
        return "–" if np.isnan(value) else "∞"
    value = max(0.0, value)  # equal rows may differ by a rounding
    return f"{value:.3f}" if value >= 0.01 or value == 0 else f"{value:.1e}".replace("e-0", "e-")


def _name(i: int, h: int) -> str:
    return f"pair-{i + 1}-{h + 1}"


def _names(layers: tuple[int, int]) -> str:
    ours, theirs = layers
    return f"{ours + 1} ← {theirs + 1}"


def _numbered(word: str, numbers: list[int]) -> str:
    """ "head 3", "heads 1 and 2", "heads 1, 2 and 3"; "heads 1 to 4" of neighbours."""
    if len(numbers) == 1:
        return f"{word} {numbers[0]}"
    if len(numbers) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{word}s {numbers[0]} to {numbers[-1]}"
    return f"{word}s {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
