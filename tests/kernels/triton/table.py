"""The tables of docs/kernels.md: what every Triton kernel takes on GPUs that need not be here, and may reach there.

    python -m headway.tests.kernels.triton.table [OP ...]

Compiles all configurations of all kernels for all targets, says what breaks a rule, and writes the tables of those of
these ops (of all, if none is named) that break none. `make kernels` calls it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from headway.kernels.triton.targets import TARGETS, Target
from headway.tests.kernels.triton.proof import OPS

PAGE = Path(__file__).parents[3] / "docs/kernels.md"
Row = dict[str, Any]


def compiled(op: str, most: int = 0, targets: Iterable[str] = TARGETS) -> list[Row]:
    """Rows of `compile`, by a process of its own; `most`: configurations of a space, 0 for all."""
    command = [sys.executable, "-m", "headway.tests.kernels.triton.compile", op, str(most), *targets]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: list[Row] = json.loads(done.stdout)
    return found


def broken(row: Row) -> list[str]:
    """Rules that a compiled kernel breaks."""
    target = TARGETS[row["target"]]
    rules = {
        f"spills {row['spilled']}": row["spilled"] == 0,
        f"takes {row['shared']} bytes of shared memory of {target.shared}": row["shared"] <= target.shared,
        "multiplies without tensor cores": row["tensor"] > 0 or not row["products"] or row["itemsize"] > 2,
        "has no loads of 16 bytes": row["wide"] > 0 or bool(row["narrow"]),
    }
    return [
        f"{row['kernel']} on {row['target']}, {row['how']}: {rule}"
        for rule, kept in rules.items()
        if not kept
    ]


def share(row: Row, target: Target) -> float:
    """Of what the target could do: the time of the least traffic and the products, over that of what the loops do.

    Each is the longest of memory's time, tensor cores' and that of other arithmetic, as if they overlapped wholly.
    """
    return least_seconds(row, target) / loop_seconds(row, target)


def least_seconds(row: Row, target: Target) -> float:
    """What a target needs for the least traffic and the products: its roofline."""
    return float(max(row["least"] / target.bandwidth, row["products"] / target.rate(row["itemsize"])))


def loop_seconds(row: Row, target: Target) -> float:
    """What a target needs for what the loops do."""
    moved = (row["read"] + row["written"]) / target.bandwidth
    products, others = row["products"] / target.rate(row["itemsize"]), row["others"] / target.vector
    return float(max(moved, products, others))


def intensity(row: Row) -> float:
    """FLOPs for every byte that is moved."""
    return (row["products"] + row["others"]) / (row["read"] + row["written"])


def table(rows: list[Row]) -> str:
    """Markdown of an op's default configurations: a line for every kernel and size, a column for every target."""
    grouped: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row["default"]:
            grouped[row["kernel"], row["size"]].setdefault(row["target"], row)
    head = ["kernel", "size", "moved / least", "FLOP / byte", *TARGETS]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for (kernel, size), found in grouped.items():
        any_row = next(iter(found.values()))
        moved = (any_row["read"] + any_row["written"]) / any_row["least"]
        cells = [f"`{kernel.removesuffix('_kernel')}`", size, f"{moved:.2f}", f"{intensity(any_row):.1f}"]
        lines.append(" | ".join(cells + [_cell(found.get(name), TARGETS[name]) for name in TARGETS]))
    return "\n".join(f"| {line} |" for line in lines)


def _cell(row: Row | None, target: Target) -> str:
    if row is None:
        return ""
    tensor = f", {row['tensor']} tc" if row["tensor"] else ""
    return f"{row['registers']} r, {row['shared'] / 1024:.0f} K{tensor}, {share(row, target):.0%}"


def digests(*ops: str) -> dict[str, str]:
    """What tables are of, by `digest`, in a process of its own."""
    command = [sys.executable, "-m", "headway.tests.kernels.triton.digest", *ops]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


class Written(NamedTuple):
    """An op's table as the page has it, and the digest of what it is of."""

    text: str
    digest: str


def written() -> dict[str, Written]:
    """All tables of the page, by op: of those whose kernels keep the rules."""
    page = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"<!-- (\w+) of (\w+) -->\n(.*?)\n<!-- end of \1 -->", page, re.DOTALL)
    return {op: Written(text, digest) for op, digest, text in found}


def write(tables: dict[str, Written]) -> None:
    """Put tables into the page, each between its own marks."""
    page = PAGE.read_text(encoding="utf-8")
    for op, (text, digest) in tables.items():
        block = f"<!-- {op} of {digest} -->\n{text}\n<!-- end of {op} -->"
        marks = re.compile(rf"<!-- {op} of \w+ -->.*?<!-- end of {op} -->", re.DOTALL)
        if marks.search(page):
            page = marks.sub(lambda _, block=block: block, page)  # type: ignore[misc]
        else:
            page = f"{page.rstrip()}\n\n### {op}\n\n{block}\n"
    PAGE.write_text(page, encoding="utf-8")


def main(*ops: str) -> int:
    chosen = ops or OPS
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(chosen, pool.map(compiled, chosen), strict=True))
    faults = {op: [fault for row in rows for fault in broken(row)] for op, rows in found.items()}
    of = digests(*chosen)
    write({op: Written(table(rows), of[op]) for op, rows in found.items() if not faults[op]})
    for op, said in faults.items():
        print("\n".join([f"{op}: {len(found[op])} compiled kernels, {len(said)} faults", *said]))
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
