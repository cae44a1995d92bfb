"""Loading: each rank reads the bytes that its own shards need, whatever layout wrote them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headway.parallel.checkpoint.layout import Held, held
from headway.parallel.checkpoint.manifest import Manifest, read_manifest
from headway.parallel.checkpoint.shards import key_of, sha256
from headway.parallel.checkpoint.team import Team, spread
from headway.parallel.checkpoint.verify import Problem, digest_problem, explain, size_problem
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError
from headway.pretrain.tensor_files import DTYPES


@dataclass(frozen=True)
class Read:
    """A piece of a file, the part of it that is wanted, and the live values that it replaces."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    slices: tuple[slice, ...]
    target: Tensor


def load(
    path: Path,
    state: State,
    *,
    strict: bool = True,
    names: Callable[[str], bool] | None = None,
    verify: bool = True,
    group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Fill the tensors of `state` in place from the checkpoint in `path`; collective.

    Everything is checked on all ranks before the first value is written, and an error is raised on all.

    Args:
        state: tensors at this run's layout, plain or DTensor; its numbers are not touched.
        strict: the checkpoint and the ranks' states together must have the same names; otherwise what both
            have is loaded. Dtypes and global shapes must agree in either case.
        names: loads only tensors whose name it accepts, on both sides.
        verify: compare the sha256 of every file that is needed, each read by one rank that needs it.
        group: the ranks that hold the state; the default process group, or this process alone.

    Returns:
        The checkpoint's numbers.

    Raises:
        CheckpointError: names the tensor or file, what was found and what was expected.
    """
    path, team = Path(path), Team(group)
    with team.together():
        manifest = read_manifest(path)
    seen = team.gather([int(manifest.digest[:15], 16)])
    if (seen != seen[0]).any():
        raise CheckpointError(
            f"{path}: ranks see different checkpoints; is it on a file system that all share?"
        )
    with team.together():
        tensors = {name: t for name, t in state.tensors.items() if names is None or names(name)}
        _check_tensors(path, manifest, tensors, strict)
        reads = _plan(manifest, held({name: t for name, t in tensors.items() if name in manifest.tensors}))
    if strict:
        _check_unexpected(path, manifest, tensors, names, team)
    _check_files(path, manifest, set(reads), verify, team)
    with team.together():
        for file, pieces in sorted(reads.items()):
            _read(path / file, pieces)
    return manifest.numbers


def read(path: Path, tensors: dict[str, Tensor]) -> None:
    """Fill some tensors from a checkpoint by this process alone, which asks no other rank and checks no digests.

    Raises:
        CheckpointError: a tensor is not there, or has another dtype or shape.
    """
    manifest = read_manifest(path)
    _check_tensors(path, manifest, tensors, strict=True)
    for file, pieces in sorted(_plan(manifest, held(tensors)).items()):
        _read(path / file, pieces)


def _check_tensors(path: Path, manifest: Manifest, tensors: dict[str, Tensor], strict: bool) -> None:
    faults = []
    for name, tensor in tensors.items():
        entry, dtype = manifest.tensors.get(name), str(tensor.dtype).removeprefix("torch.")
        if entry is None:
            faults += [f"tensor {name} is missing in the checkpoint"] if strict else []
        elif entry.dtype != dtype:
            faults.append(f"tensor {name}: dtype {entry.dtype} in the checkpoint, {dtype} in the run")
        elif entry.shape != tuple(tensor.shape):
            shapes = f"shape {list(entry.shape)} in the checkpoint, {list(tensor.shape)} in the run"
            faults.append(f"tensor {name}: {shapes}")
    if faults:
        raise CheckpointError(f"{path} does not fit: {_listed(faults)}.")


def _check_unexpected(
    path: Path,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    names: Callable[[str], bool] | None,
    team: Team,
) -> None:
    """Each tensor of the checkpoint must be wanted by some rank: pipeline stages have different ones."""
    known = [name for name in sorted(manifest.tensors) if names is None or names(name)]
    wanted = team.gather([name in tensors for name in known]).any(0).tolist()
    if left := [name for name, some in zip(known, wanted, strict=True) if not some]:
        faults = [f"tensor {name} of the checkpoint is not in the run" for name in left]
        raise CheckpointError(f"{path} does not fit: {_listed(faults)}.")


def _check_files(path: Path, manifest: Manifest, needed: set[str], verify: bool, team: Team) -> None:
    """Sizes of the files that this rank reads, and digests of all that any rank reads, each taken once."""
    files = sorted(manifest.files)
    problems = [problem for file in sorted(needed) if (problem := size_problem(path, file, manifest))]
    bad = {problem.file.name for problem in problems}
    with team.together():
        if problems:
            raise explain(path, problems)
    if not verify:
        return
    wants = team.gather([file in needed and file not in bad for file in files])
    shared = [file for file, column in zip(files, wants.T, strict=True) if column.any()]
    holders = [column.nonzero().flatten().tolist() for column in wants.T if column.any()]
    owners = spread(holders, [manifest.files[file].bytes for file in shared], team.world)
    with team.together():
        found: list[Problem] = []
        for file, owner in zip(shared, owners, strict=True):
            if owner == team.rank:
                try:
                    problem = digest_problem(path, file, manifest, sha256(path / file))
                except OSError as error:
                    raise CheckpointError(f"{path / file}: cannot be read: {error.strerror}.") from error
                found += [problem] if problem else []
        if found:
            raise explain(path, found)


def _plan(manifest: Manifest, parts: list[Held]) -> dict[str, list[Read]]:
    """By file: which pieces overlap this rank's parts, and where in both."""
    reads: dict[str, list[Read]] = defaultdict(list)
    for part in parts:
        entry = manifest.tensors[part.name]
        for piece in entry.pieces:
            if common := piece.box.overlap(part.box):
                key, target = key_of(part.name, piece.box, entry.shape), part.view[common.within(part.box)]
                reads[piece.file].append(
                    Read(key, entry.dtype, piece.box.shape, common.within(piece.box), target)
                )
    return dict(reads)


@torch.no_grad()
def _read(file: Path, reads: list[Read]) -> None:
    """Copy pieces of one file into place, one at a time. The file is mapped: only what is wanted is read."""
    try:
        with safe_open(file, framework="pt") as shard:
            for read in reads:
                piece = shard.get_slice(read.key)
                stored = (piece.get_dtype(), tuple(piece.get_shape()))
                if stored != (expected := (DTYPES[read.dtype][0], read.shape)):
                    raise CheckpointError(
                        f"{file}: piece {read.key} is {stored}, the manifest says {expected}."
                    )
                # get_slice takes no empty index: a scalar is read whole.
                values = piece[read.slices] if read.slices else shard.get_tensor(read.key)
                read.target.copy_(values)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: cannot be read: {error}.") from error


def _listed(faults: list[str], most: int = 8) -> str:
    more = f"; and {len(faults) - most} more" if len(faults) > most else ""
    return "; ".join(faults[:most]) + more
