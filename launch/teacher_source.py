"""Where a teacher comes from: its job, the shapes and values of its weights, its tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.launch.companions import find_job_tokenizer
from headway.launch.start_from import find_checkpoint, is_weight
from headway.parallel.checkpoint.load import read
from headway.parallel.checkpoint.manifest import read_manifest
from headway.pretrain import config
from headway.pretrain.config import Job
from headway.pretrain.data.tokenizer import load_tokenizer
from headway.pretrain.errors import CheckpointError, HeadwayError, JobError
from headway.pretrain.hf.folder import Folder, is_folder, open_folder
from headway.pretrain.hf.tokenizers import find_tokenizer
from headway.pretrain.recipe import validate

FIELD = "objective.distill.teacher"


@dataclass
class TeacherSource:
    """A model that was trained before.

    Attributes:
        place: what the job calls it.
        path: the checkpoint, or the folder of Hugging Face.
        folder: the latter, read.
        job: its own, without a teacher of its own.
    """

    place: str
    path: Path
    folder: Folder | None
    job: Job

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of its weights, by canonical name."""
        if self.folder is not None:
            return self.folder.shapes()
        return {n: tuple(e.shape) for n, e in read_manifest(self.path).tensors.items() if is_weight(n)}

    @cached_property
    def precision(self) -> str:
        """Of its weights as they are stored: fp32 (narrower ones are read as that), or fp64."""
        if self.folder is not None:
            return "fp64" if next(self.folder.tensors())[1].dtype == torch.float64 else "fp32"
        entries = read_manifest(self.path).tensors
        return "fp64" if any(entries[name].dtype == "float64" for name in self.shapes) else "fp32"

    def tensors(self, names: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
        """Those of some names, one at a time, whole, on the host."""
        if self.folder is not None:
            yield from (pair for pair in self.folder.tensors() if pair[0] in names)
            return
        entries = read_manifest(self.path).tensors
        for name in sorted(names.keys() & entries.keys()):
            tensor = torch.empty(entries[name].shape, dtype=getattr(torch, entries[name].dtype))
            read(self.path, {name: tensor})
            yield name, tensor

    @cached_property
    def digest(self) -> str:
        """What tells it from any other: of the checkpoint's manifest, or of the weights' files."""
        if self.folder is None:
            return read_manifest(self.path).digest
        found = hashlib.sha256(json.dumps(self.folder.hf_config, sort_keys=True).encode())
        for name, tensor in self.folder.tensors():
            found.update(name.encode())
            found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def pieces(self) -> list[str] | None:
        """Of its tokenizer; None if it has none that can be read."""
        if self.folder is not None:
            found = find_tokenizer(self.folder.path)
            if found is None:
                return None
            path = self.folder.path / found.file
            settings = config.Tokenizer.model_validate({"kind": found.kind, "path": str(path)})
            return load_tokenizer(settings, path).pieces()
        try:
            return find_job_tokenizer(self.job)[1].pieces()
        except HeadwayError:
            return None


def open_teacher(place: str) -> TeacherSource:
    """Find a teacher.

    Raises:
        JobError: there is no model.
    """
    path = Path(place).expanduser()
    try:
        if is_folder(path):
            folder = open_folder(path)
            return TeacherSource(place, path, folder, folder.job)
        path = find_checkpoint(str(path))
        tree = read_manifest(path).job
    except CheckpointError as fault:
        rule = f"no teacher is there: {fault}"
        raise JobError(FIELD, place, rule, "a run, a checkpoint, or a folder of Hugging Face") from None
    tree = {**tree, "objective": {**tree["objective"], "distill": {}}}
    return TeacherSource(place, path, None, validate(tree))
