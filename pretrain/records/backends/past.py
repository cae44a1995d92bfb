"""What was told of the steps before a start, as `metrics.jsonl` has it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def rows(metrics: Path, after: int, until: int) -> Iterator[tuple[int, dict[str, float]]]:
    """(step, numbers) of `metrics.jsonl`, of the steps after `after` up to `until`."""
    if not metrics.exists() or until <= after:
        return
    with open(metrics, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                return
            if after < row["step"] <= until:
                step = row.pop("step")
                yield step, numbers(row)


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """What of a line was told when it was new: numbers, members of lists as `name/i`; `null` is not finite."""
    spread = {f"{k}/{i}": x for k, v in row.items() if isinstance(v, list) for i, x in enumerate(v)}
    found = {k: math.nan if v is None else v for k, v in {**row, **spread}.items()}
    return {k: v for k, v in found.items() if isinstance(v, int | float)}
