"""The table of `make demos`: what each small recipe reached, beside its baseline; fails where one is not better."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

RUNS = Path("runs")
WANTED = {"vit-tiny": 0.97}
"""Accuracies that a run must reach beside beating its baseline."""


def main() -> int:
    table, failures = Table("run", "measure", "this model", "baselines", "steps", "time"), []
    for folder in sorted(RUNS.glob("*-*tiny")):
        summary = json.loads((folder / "summary.json").read_text())
        score = summary["score"]
        (_, ours), *others = score["entries"]
        baselines = ", ".join(f"{name} {value:.3f}" for name, value in others)
        table.add_row(
            folder.name,
            score["title"],
            f"{ours:.4f}",
            baselines,
            str(summary["steps"]),
            f"{summary['seconds']:.0f} s",
        )
        lower = score["lower"]
        if not all(ours < value if lower else ours > value for _, value in others):
            failures.append(f"{folder.name} is not better than {baselines}")
        if ours < WANTED.get(folder.name, -1):
            failures.append(f"{folder.name}: {ours:.4f} is less than {WANTED[folder.name]}")
    experts, dense = (heldout_loss(f"moe-{name}") for name in ("tiny", "dense_tiny"))
    table.add_row("moe-tiny", "held-out loss", f"{experts:.4f}", f"dense {dense:.4f}", "", "")
    if experts >= dense:
        failures.append(f"experts: held-out loss {experts:.4f} is not below the dense model's {dense:.4f}")
    Console().print(table)
    print(*failures, sep="\n", file=sys.stderr)
    return int(bool(failures))


def heldout_loss(run: str) -> float:
    return float(json.loads((RUNS / run / "summary.json").read_text())["heldout_loss"])


if __name__ == "__main__":
    sys.exit(main())
