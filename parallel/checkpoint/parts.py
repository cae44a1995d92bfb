"""What ranks tell rank 0 about their shards, as JSON files in the staging folder: no collective is needed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from headway.parallel.checkpoint.boxes import Box
from headway.parallel.checkpoint.manifest import Entry, File, Manifest, Piece
from headway.pretrain.errors import CheckpointError

POLL = 0.02
"""Seconds between looks at the staging folder."""


def part_name(rank: int) -> str:
    return f"part_{rank:05d}.json"


def shard_name(rank: int) -> str:
    return f"shard_{rank:05d}.safetensors"


def tell(staging: Path, rank: int, part: dict[str, Any]) -> None:
    """Leave this rank's part for rank 0, whole at once. Raises OSError."""
    fresh = staging / f".{part_name(rank)}"
    fresh.write_text(json.dumps(part))
    os.replace(fresh, staging / part_name(rank))


def collect(staging: Path, world: int, timeout: float) -> list[dict[str, Any]]:
    """The parts of all ranks, in the order of ranks; waits until `timeout` seconds pass without a new one.

    Raises:
        CheckpointError: names the ranks whose parts are missing, or the first rank that reported a fault.
        OSError: the folder is gone or cannot be read.
    """
    found: dict[int, dict[str, Any]] = {}
    deadline = time.monotonic() + timeout
    while True:
        there = set(os.listdir(staging))
        for rank in range(world):
            if rank not in found and part_name(rank) in there:
                found[rank] = json.loads((staging / part_name(rank)).read_text())
                deadline = time.monotonic() + timeout
                if "error" in found[rank]:
                    raise CheckpointError(f"rank {rank} failed: {found[rank]['error']}")
        if len(found) == world:
            return [found[rank] for rank in range(world)]
        if time.monotonic() > deadline:
            missing = [rank for rank in range(world) if rank not in found]
            names = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
            raise CheckpointError(
                f"{staging}: no word from {len(missing)} of {world} ranks for {timeout:g} s: {names}. "
                "They are slow or gone, or this folder is not on a file system that all ranks share."
            )
        time.sleep(POLL)


def merge(
    parts: Iterable[dict[str, Any]], step: int, numbers: dict[str, Any], job: dict[str, Any], staging: Path
) -> Manifest:
    """One manifest from all parts, checked: the same shapes and dtypes everywhere, every tensor covered."""
    parts = list(parts)
    shapes: dict[str, tuple[tuple[int, ...], str]] = {}
    pieces: dict[str, list[Piece]] = {}
    for part in parts:
        for name, entry in part["tensors"].items():
            shape = (tuple(entry["shape"]), entry["dtype"])
            if shapes.setdefault(name, shape) != shape:
                raise CheckpointError(f"tensor {name}: is {shapes[name]} on one rank and {shape} on another.")
            boxes = (Box(tuple(offset), tuple(size)) for offset, size in entry["boxes"])
            pieces.setdefault(name, []).extend(Piece(box, part["file"]) for box in boxes)
    manifest = Manifest(
        step=step,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        world=len(parts),
        tensors={name: Entry(*shapes[name], tuple(pieces[name])) for name in sorted(shapes)},
        files={part["file"]: File(part["bytes"], part["sha256"]) for part in parts if part["file"]},
        numbers=numbers,
        job=job,
    )
    manifest.check(staging)
    return manifest
