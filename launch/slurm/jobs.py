"""What is kept of a run's jobs: `RUN/slurm/jobs.jsonl`, one line for each that was submitted, and each fault and stop.

Whatever happens to Slurm's memory of a job, the run folder tells which jobs worked on it.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from headway.pretrain.errors import JobError

CANCELLED = "cancelled"
"""File that says that the run's jobs are not to be started again."""


def slurm_folder(run: Path) -> Path:
    return run / "slurm"


def note(run: Path, kind: str, **fields: Any) -> None:
    """Append a line: `submitted` (job, and `after`, `without`, `runs` or `log` where so), `fault` or `stop`
    (job, code, nodes, step)."""
    folder = slurm_folder(run)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "jobs.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"time": time.time(), "kind": kind, **fields}) + "\n")


def notes(run: Path) -> list[dict[str, Any]]:
    """All lines, in order; a torn last one is left out."""
    found = []
    path = slurm_folder(run) / "jobs.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def logs(run: Path) -> list[Path]:
    """What the run's jobs have printed, the newest last; a sweep has the logs of its runs."""
    noted = [Path(line["log"]) for line in notes(run) if "log" in line]
    there = {path.resolve() for path in (*slurm_folder(run).glob("*.log"), *noted) if path.exists()}
    return sorted(there, key=lambda path: path.stat().st_mtime)


def submitted(run: Path) -> list[str]:
    """Ids of the run's jobs, in the order in which they were submitted.

    Raises:
        JobError: no job was ever submitted for it.
    """
    jobs = [str(line["job"]) for line in notes(run) if line["kind"] == "submitted"]
    if not jobs:
        raise JobError("run", str(run), "has no jobs of Slurm", "headway launch slurm RECIPE")
    return jobs
