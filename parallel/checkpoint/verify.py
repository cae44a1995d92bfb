"""Verification: every byte of a checkpoint against the digests of its manifest."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from headway.parallel.checkpoint.manifest import MANIFEST, Manifest, read_manifest
from headway.parallel.checkpoint.retention import latest, list_checkpoints, step_of
from headway.parallel.checkpoint.shards import sha256
from headway.pretrain.errors import CheckpointError


@dataclass(frozen=True)
class Problem:
    """What is wrong with one file of a checkpoint."""

    file: Path
    what: str
    found: str
    expected: str

    def __str__(self) -> str:
        return f"{self.file}: {self.what} is {self.found}, expected {self.expected}."


def verify(path: Path) -> list[Problem]:
    """All that is wrong with a checkpoint folder; empty if it is whole. Reads every file once.

    Finds an unreadable or altered manifest, and files that are missing, truncated, extra or altered.
    """
    path = Path(path)
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [Problem(path / MANIFEST, "manifest", str(error), "a manifest that can be trusted")]
    problems = [problem for name in manifest.files if (problem := size_problem(path, name, manifest))]
    bad = {problem.file.name for problem in problems}
    for name in manifest.files.keys() - bad:
        if problem := digest_problem(path, name, manifest, _digest(path / name)):
            problems.append(problem)
    for name in sorted(set(os.listdir(path)) - {MANIFEST} - manifest.files.keys()):
        problems.append(
            Problem(path / name, "the folder's content", "an extra file", "only files of the manifest")
        )
    return sorted(problems, key=lambda problem: problem.file)


def newest_good(folder: Path) -> tuple[Path | None, list[Problem]]:
    """The newest checkpoint without a problem, and the problems of the newer ones that were passed over.

    The one that LATEST names comes first, then earlier steps, then steps that the run had gone back from.
    """
    newest, there = latest(folder), list_checkpoints(folder)
    limit = step_of(newest.name) or 0 if newest else 0
    order = sorted(there, key=lambda path: ((step_of(path.name) or 0) > limit, -(step_of(path.name) or 0)))
    problems: list[Problem] = []
    for path in order:
        if not (found := verify(path)):
            return path, problems
        problems += found
    return None, problems


def size_problem(path: Path, name: str, manifest: Manifest) -> Problem | None:
    """A shard file that is missing, no plain file, or of another size than the manifest says."""
    file, expected = path / name, f"{manifest.files[name].bytes} bytes"
    if not file.is_file():
        return Problem(file, "the shard", "missing", expected)
    if (size := file.stat().st_size) != manifest.files[name].bytes:
        return Problem(file, "size", f"{size} bytes", expected)
    return None


def digest_problem(path: Path, name: str, manifest: Manifest, found: str) -> Problem | None:
    """A shard file whose bytes are not those that were written."""
    expected = manifest.files[name].sha256
    return None if found == expected else Problem(path / name, "sha256", found, expected)


def _digest(path: Path) -> str:
    try:
        return sha256(path)
    except OSError as error:
        return f"unreadable ({error.strerror})"


def explain(path: Path, problems: Iterable[Problem]) -> CheckpointError:
    """The error for a checkpoint that cannot be used: every problem, and where an older checkpoint lies."""
    step = step_of(path.name)
    older = [p for p in list_checkpoints(path.parent) if step is not None and (step_of(p.name) or 0) < step]
    hint = f" The checkpoint before it is {older[-1]}." if older else " There is no checkpoint before it."
    return CheckpointError(f"{path} is damaged: " + " ".join(map(str, problems)) + hint)
