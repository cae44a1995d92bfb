"""`train.start_from`: a new run begins with the weights of a checkpoint, a run, or a folder of Hugging Face."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.checkpoint.boxes import Box
from headway.parallel.checkpoint.layout import held
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.retention import list_checkpoints
from headway.parallel.checkpoint.verify import newest_good
from headway.pretrain.config import Job
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError, JobError
from headway.pretrain.hf.family import value_of
from headway.pretrain.hf.folder import Folder, is_folder, open_folder

VOCABULARY = ("model.embed.tokens.weight", "head.weight", "head.extra", "head.bias")
"""Tensors with a row for every piece. Published ones may have more rows than the tokenizer has pieces."""
HEADS = ("head.", "head_distill.", "pair.", "decoder.", "model.pooler.")
"""What an objective adds to a model: another objective may lack it, or begin with its initial weights."""
AVERAGE = "ema."
"""How names of averaged weights begin (optimizer.ema)."""
WEIGHTS = ("model.", *HEADS)
"""How names of weights begin; moments of optimizers and averages have other names."""


def is_weight(name: str) -> bool:
    """Whether a tensor of a checkpoint is a weight of the model; what a student learned to compare itself by is
    none."""
    return name.startswith(WEIGHTS) and ".tap." not in name


TRAINING = (
    "model.dropout",
    "model.attention.dropout",
    "model.init.",
    "model.experts.balance",
    "model.experts.jitter",
)
"""Settings of a model that do not change what its weights mean."""


def start_from(
    weights: Mapping[str, Tensor], job: Job, place: str, group: dist.ProcessGroup | None = None
) -> list[str]:
    """Fill a new run's weights; collective.

    Args:
        weights: canonical name -> live tensor, plain or DTensor.
        place: `train.start_from`.
        group: the ranks that hold them; all if None.

    Returns:
        What a person should know, a line each.

    Raises:
        CheckpointError, JobError: the weights do not fit; names what differs.
    """
    if is_folder(Path(place)):
        folder = open_folder(Path(place))
        check_same_model(folder, job)
        lost = folder.left_over()
        if unknown := [name for name in lost if not _is_head_there(name)]:
            raise CheckpointError(f"{place}: Headway has no place for {', '.join(unknown)}")
        unused = [f"{place}: {name} is not used" for name in lost]
        return fill(weights, folder.tensors(), place, job) + unused
    return from_checkpoint(weights, find_checkpoint(place), job, group)


def from_checkpoint(
    weights: Mapping[str, Tensor], path: Path, job: Job, group: dist.ProcessGroup | None = None
) -> list[str]:
    """Fill weights from a checkpoint of Headway: what has the same shape is read shard by shard."""
    entries = read_manifest(path).tensors
    there = {name: entry for name, entry in entries.items() if is_weight(name)}
    other = {n for n in there.keys() & weights.keys() if there[n].shape != tuple(weights[n].shape)}
    same = State({name: t for name, t in weights.items() if name in there and name not in other})
    load(path, same, strict=False, group=group)
    whole = {n: torch.empty(there[n].shape, dtype=getattr(torch, there[n].dtype)) for n in other}
    load(path, State(whole), strict=False, verify=False, group=group)
    absent = {name: torch.empty(()) for name in there.keys() - weights.keys()}
    rest = {name: t for name, t in weights.items() if name not in same.tensors}
    return fill(rest, [*whole.items(), *absent.items()], str(path), job)


def fill(
    weights: Mapping[str, Tensor], source: Iterable[tuple[str, Tensor]], place: str, job: Job
) -> list[str]:
    """Copy whole tensors into the parts that this rank holds; what a person should know.

    Raises:
        CheckpointError: a tensor of the model is missing, one is left over, or a shape differs.
    """
    notes: list[str] = []
    faults: list[str] = []
    found = set()
    for name, tensor in source:
        if name not in weights:
            (notes if name.startswith(HEADS) else faults).append(f"{name} is not in the model of this job")
            continue
        wanted = tuple(weights[name].shape)
        if wanted != tuple(tensor.shape):
            if name.startswith(("head.", "head_distill.")) and job.model.family == "vit":
                notes.append(f"{name} has {len(tensor)} rows for {wanted[0]} classes: it begins anew")
                found.add(name)
                continue
            if name not in VOCABULARY or len(tensor) < wanted[0] or tensor.shape[1:] != wanted[1:]:
                faults.append(f"{name} has shape {list(tensor.shape)}, the model of this job {list(wanted)}")
                found.add(name)
                continue
            notes.append(f"{name}: {len(tensor) - wanted[0]} rows beyond the vocabulary are left out")
            tensor = tensor[: wanted[0]]
        found.add(name)
        for part in held({name: weights[name]}):
            part.view.copy_(tensor[part.box.within(Box.whole(wanted))])
    for name in sorted(weights.keys() - found):
        if name.startswith(HEADS):
            notes.append(f"{name} is not there: it begins with initial weights")
        else:
            faults.append(f"{name} is missing")
    if faults:
        raise CheckpointError(f"{place} does not fit: {'; '.join(faults)}")
    return [f"{place}: {note}" for note in notes]


def check_same_model(folder: Folder, job: Job) -> None:
    """Raise JobError where a job's model means something else than the weights of a folder."""
    for setting in folder.settings:
        if not setting.startswith("model.") or setting.startswith(TRAINING):
            continue
        theirs, ours = value_of(folder.job, setting), value_of(job, setting)
        close = (
            isinstance(ours, float) and isinstance(theirs, float) and math.isclose(ours, theirs, rel_tol=1e-6)
        )
        if theirs != ours and not close:
            rule = f"the weights of train.start_from = {folder.path} have another value"
            raise JobError(setting, ours, rule, theirs)


def find_checkpoint(place: str) -> Path:
    """A checkpoint folder, or the newest whole one of a run folder.

    Raises:
        CheckpointError: neither is there.
    """
    path = Path(place)
    if (path / "manifest.json").exists():
        return path
    for folder in (path / "checkpoints", path):
        if list_checkpoints(folder):
            found, problems = newest_good(folder)
            if found:
                return found
            raise CheckpointError(f"{folder}: no checkpoint is whole: {'; '.join(map(str, problems))}")
    raise CheckpointError(
        f"{place}: neither a checkpoint, nor a run with checkpoints, nor a Hugging Face folder"
    )


def _is_head_there(name: str) -> bool:
    """Whether a tensor of Hugging Face belongs to a head that Headway has no place for."""
    return any(
        word in name for word in ("pooler", "classifier", "cls.", "predictions", "score", "qa_outputs")
    )
