"""The checkpoints of a run: which there are, which is the latest, and which may go."""

from __future__ import annotations

import os
import re
import secrets
from pathlib import Path

from headway.parallel.checkpoint.durable import remove_tree
from headway.parallel.checkpoint.manifest import MANIFEST

LATEST = "LATEST"
TRASH = ".trash-"

_STEP = re.compile(r"step_(\d{8,})")


def folder_name(step: int) -> str:
    """Name of the folder of a step's checkpoint."""
    return f"step_{step:08d}"


def step_of(name: str) -> int | None:
    """The step in a checkpoint folder's name, or None if it is no such name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def list_checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints, oldest step first. A folder gets its name only when it is complete."""
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    steps = sorted((step, name) for name in names if (step := step_of(name)) is not None)
    return [path for _, name in steps if (path := Path(folder) / name).joinpath(MANIFEST).is_file()]


def latest(folder: Path) -> Path | None:
    """The checkpoint that LATEST names; the highest step if LATEST is missing or names none; None if none."""
    there = list_checkpoints(folder)
    try:
        # A name is short: no more is read of whatever lies there.
        with open(Path(folder) / LATEST, "rb") as file:
            named = file.read(100).decode(errors="replace").strip()
    except OSError:
        named = ""
    return next((path for path in there if path.name == named), there[-1] if there else None)


def retire(folder: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Delete what is no longer kept, after the checkpoint of `step` has been published and found whole.

    Kept are the newest `keep_last` up to `step`, multiples of `keep_every`, and what LATEST names.
    Checkpoints of later steps (the run went back) are neither counted nor touched until the run is past them.
    A folder is first renamed, so that a kill in between leaves nothing that looks like a checkpoint.
    """
    named = latest(folder)
    passed = [path for path in list_checkpoints(folder) if (step_of(path.name) or 0) <= step]
    for path in passed[:-keep_last]:
        kept_for_good = keep_every and (step_of(path.name) or 0) % keep_every == 0
        if path != named and not kept_for_good:
            discard(path)


def discard(path: Path) -> None:
    """Remove a folder: out of sight in one step, then piece by piece. Raises OSError if it stays in sight."""
    trash = path.with_name(f"{TRASH}{path.name.lstrip('.')}-{secrets.token_hex(4)}")
    path.rename(trash)
    remove_tree(trash)
