"""`headway checkpoint`: what a run has saved, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from headway.launch.console import console
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.retention import latest, list_checkpoints
from headway.parallel.checkpoint.verify import verify as problems_of
from headway.pretrain.errors import CheckpointError, JobError


def folders(place: str) -> list[Path]:
    """Checkpoints of a run folder, of a folder of checkpoints, or the one given; raises JobError if none."""
    path = Path(place)
    if (path / "manifest.json").exists():
        return [path]
    found = list_checkpoints(path / "checkpoints") or list_checkpoints(path)
    if not found:
        raise JobError("run", place, "is neither a checkpoint nor a run that has one", "e.g. runs/gpt-tiny")
    return found


def show(place: str) -> None:
    """Print a table of checkpoints."""
    found = folders(place)
    newest = latest(found[-1].parent)
    table = Table(box=None, header_style="bold")
    for title in ("checkpoint", "size", "tensors", "ranks", "written", ""):
        table.add_column(title, no_wrap=True)
    for path in found:
        mark = "LATEST" if path == newest else ""
        try:
            manifest = read_manifest(path)
        except CheckpointError as error:
            table.add_row(path.name, "", "", "", "", f"broken: {error}")
            continue
        size = f"{manifest.nbytes / 2**20:.1f} MiB"
        table.add_row(
            path.name, size, str(len(manifest.tensors)), str(manifest.world), manifest.created, mark
        )
    console().print(table)


def verify(place: str) -> None:
    """Check every digest; raises CheckpointError that names each bad file and the newest good checkpoint."""
    good: list[Path] = []
    bad: list[Path] = []
    for path in folders(place):
        problems = problems_of(path)
        (bad if problems else good).append(path)
        print(f"{path}: {'whole' if not problems else 'BROKEN'}")
        for problem in problems:
            print(f"  {problem}")
    if bad:
        rest = f"the newest good one is {good[-1]}" if good else "none is whole"
        raise CheckpointError(f"{len(bad)} of {len(good) + len(bad)} checkpoints are broken; {rest}")
