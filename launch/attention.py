"""`headway attention`: every mechanism with what it computes, costs and supports; and their times side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from headway.kernels.attention.registry import Mechanism, Shape, mechanism, words
from headway.launch.console import console
from headway.pretrain.config import Attention
from headway.pretrain.errors import JobError

SUPPORTS = {
    "causal": "causal", "bidirectional": "both ways", "cross": "across", "documents": "documents",
    "padding": "padding", "dropout": "dropout", "grouped": "grouped", "bias": "bias", "rotary": "rotary",
    "maps": "maps", "tensor": "tensor", "context_ring": "ring", "context_ulysses": "ulysses", "images": "images only",
}  # fmt: skip


def ls(as_json: bool = False, tokens: int = 4096) -> None:
    """Print the table of mechanisms; costs are of a causal row (if it can be) with 8 heads of 64."""
    rows = [facts(row, tokens) for row in words().values()]
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table(box=None, header_style="bold")
    for title in (
        "word",
        "kind",
        "formula",
        "time",
        f"GFLOP at {tokens}",
        "kernels",
        "settings",
        "supports",
        "source",
    ):
        table.add_column(title, overflow="fold", no_wrap=title in ("word", "kind", "time"))
    for row in rows:
        table.add_row(
            row["word"],
            row["kind"],
            row["formula"],
            row["order"],
            f"{row['flops'] / 1e9:.2f}",
            ", ".join(row["kernels"]),
            ", ".join(f"{name} {value}" for name, value in row["settings"].items()),
            ", ".join(title for key, title in SUPPORTS.items() if key in row["supports"]),
            row["source"],
        )
    console().print(table)
    print("\nWords of the kinds score, weights and scope compose: model.attention.mechanism: window+sink")


def facts(row: Mechanism, tokens: int) -> dict[str, Any]:
    """What is known of a mechanism, as plain data."""
    shape = shape_of(row, tokens)
    return {
        "word": row.name,
        "kind": row.kind,
        "formula": row.formula,
        "order": row.order,
        "flops": row.flops(shape),
        "bytes_bf16": row.bytes(shape, 2),
        "state": row.state(shape),
        "kernels": {kernel.name: kernel.memory for kernel in row.kernels.values()},
        "settings": {name: value for name, value in shape.settings.items() if name in Attention.model_fields},
        "supports": sorted(row.supports),
        "source": row.source,
    }


def shape_of(row: Mechanism, tokens: int, heads: int = 8, dim: int = 64) -> Shape:
    """Attention over so many tokens, causal if it can be, with its own settings."""
    settings = Attention().settings(0, row.settings)
    return Shape(heads, heads, dim, heads * dim, tokens, tokens, "causal" in row.supports, settings)


def compare(
    lengths: Sequence[int], names: Sequence[str], limit: float, folder: str, dtype: str, threads: int | None
) -> None:
    """Time and peak memory of forward and backward of mechanisms, as a table, `compare.json` and `compare.png`.

    Args:
        lengths: tokens of the row.
        names: mechanisms; all if there are none.
        limit: seconds that a call may take; lengths that would take longer by the growth so far are left out.
        folder: where the files go.
        dtype: of the computation.
        threads: of the CPU.
    """
    from headway.launch.timing import draw, measure

    chosen = [mechanism(name).name for name in names] or list(words())
    if bad := [n for n in lengths if n < 16]:
        raise JobError("--seq", bad[0], "a row of at least 16 tokens", 16)
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    found: list[dict[str, Any]] = []
    table = Table(box=None, header_style="bold")
    for title in ("mechanism", "tokens", "forward ms", "backward ms", "peak MiB", "times dense", "slope"):
        table.add_column(title, justify="left" if title == "mechanism" else "right")
    with console().status("") as status:
        for point in measure(
            chosen, sorted(lengths), limit=limit, dtype=dtype, threads=threads, say=status.update
        ):
            found.append(point)
            (place / "compare.json").write_text(json.dumps(found, indent=2))
    for point in found:
        table.add_row(*_cells(point, found))
    console().print(table)
    print(f"{place / 'compare.json'}, {draw(found, place / 'compare.png')}")


def _cells(point: dict[str, Any], found: Sequence[dict[str, Any]]) -> list[str]:
    """A row of the table: beside what was measured, the ratio to dense attention and the growth on a log-log plot."""
    import math

    dense = [p for p in found if p["mechanism"] == "dense" and p["tokens"] == point["tokens"]]
    before = [p for p in found if p["mechanism"] == point["mechanism"] and p["tokens"] < point["tokens"]]
    ratio = f"{dense[0]['seconds'] / point['seconds']:.2f}" if dense else ""
    slope = ""
    if before:
        last = before[-1]
        slope = (
            f"{math.log(point['seconds'] / last['seconds']) / math.log(point['tokens'] / last['tokens']):.2f}"
        )
    return [
        point["mechanism"],
        f"{point['tokens']:,}",
        f"{point['forward'] * 1e3:.1f}",
        f"{point['backward'] * 1e3:.1f}",
        f"{point['peak'] / 2**20:.0f}",
        ratio,
        slope,
    ]
