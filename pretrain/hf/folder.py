"""Folders of Hugging Face: config.json and weights, read without transformers and written for it."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from headway.pretrain.config import Job
from headway.pretrain.errors import CheckpointError
from headway.pretrain.hf import family_of_config
from headway.pretrain.hf.family import Family, Settings
from headway.pretrain.hf.links import Lazy, renamed, to_ours
from headway.pretrain.recipe import validate
from headway.pretrain.tensor_files import bytes_of

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
FOREIGN = ("pytorch_model.bin", "pytorch_model.bin.index.json")
"""Files of torch.save. They are read by torch's restricted unpickler, which builds tensors and runs no code."""


def is_folder(place: Path) -> bool:
    """Whether a folder holds a model of Hugging Face."""
    return (place / "config.json").is_file() and any((place / name).is_file() for name in WEIGHTS + FOREIGN)


@dataclass(frozen=True)
class Folder:
    """A model of Hugging Face that lies in a folder.

    Attributes:
        path: the folder.
        hf_config: its config.json.
        family: what it is.
        settings: what it is in Headway's words, dotted setting -> value.
        source: its tensors under full names, without second copies of tied ones.
    """

    path: Path
    hf_config: dict[str, Any]
    family: Family
    settings: Settings
    source: Lazy

    @property
    def job(self) -> Job:
        """A job with these settings, all else by default."""
        return validate(tree_of(self.settings))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(canonical name, tensor in fp32, or fp64 where it is fp64), one at a time.

        Raises:
            CheckpointError: a part of a tensor is missing, or fixed positions are others than Headway's.
        """
        job = self.job
        for name, tensor in to_ours(self.family.links(job), self.source):
            yield name, tensor if tensor.dtype == torch.float64 else tensor.float()
        for name, value in self.family.constants(job).items():
            # 1e-5: tables that were computed in fp32
            if name in self.source.names and not torch.allclose(
                self.source.read(name).float(), value, atol=1e-5
            ):
                raise CheckpointError(
                    f"{self.path}: {name} is not the table of sines and cosines that MAE has"
                )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape."""
        return {name: tuple(tensor.shape) for name, tensor in self.tensors()}

    def left_over(self) -> list[str]:
        """Names of tensors that Headway has no place for."""
        used = {name for link in self.family.links(self.job) for name in link.theirs}
        return sorted(self.source.names - used - set(self.family.constants(self.job)))


def open_folder(place: Path) -> Folder:
    """Read config.json and find the tensors.

    Raises:
        CheckpointError: a file is missing or unreadable.
        JobError: a kind of model that Headway does not have.
    """
    hf_config = read_json(place / "config.json")
    family = family_of_config(hf_config)
    hf_config["model_type"] = family.model_type
    source = renamed(_open_weights(place), family.spellings)
    known = {**family.defaults, **hf_config}
    source = _without_copies(source, family, tied=bool(known.get("tie_word_embeddings", True)))
    return Folder(place, hf_config, family, family.to_model(hf_config, source.names), source)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as fault:
        raise CheckpointError(f"{path} cannot be read: {fault}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return value


def tree_of(settings: Settings) -> dict[str, Any]:
    """Dotted settings as the tree of a recipe."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *sections, key = name.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        place[key] = value
    return tree


def _without_copies(source: Lazy, family: Family, tied: bool) -> Lazy:
    """Without tensors that are stored twice. A head that the configuration calls untied is no copy."""
    stored = {copy: first for copy, first in family.copies.items() if {copy, first} <= source.names}
    equal = {c for c, first in stored.items() if _digest(source.read(c)) == _digest(source.read(first))}
    embeddings = {copy for copy in stored if "embed_tokens" in copy}
    heads = stored.keys() - embeddings
    copies = (equal & embeddings) | (heads if tied and heads <= equal else set())
    return Lazy(source.names - copies, source.read)


def _digest(tensor: Tensor) -> tuple[Any, ...]:
    """What two equal tensors share; compared in their stead, so that one table at a time is in memory."""
    return tensor.dtype, tensor.shape, hashlib.sha256(bytes_of(tensor)).digest()


def _open_weights(place: Path) -> Lazy:
    """All tensors of a folder by the names in its files.

    A tensor is mapped, not read, and its file is opened for it alone: what was mapped is given back with it. So one
    tensor at a time is in memory, of whatever size the files are; of a file in the format that torch.save had before
    1.6, which cannot be mapped, the whole file.
    """
    single, index = next(
        (pair for pair in (WEIGHTS, FOREIGN) if any((place / name).is_file() for name in pair)), WEIGHTS
    )
    if (place / index).is_file():
        files = {place / Path(name).name for name in read_json(place / index)["weight_map"].values()}
    else:
        files = {place / single}
    pickles = lru_cache(maxsize=1)(_unpickled)  # of one file: its tensors are asked for one after another
    where: dict[str, Path] = {}
    for path in sorted(files):
        where |= dict.fromkeys(_names(path, pickles), path)
    return Lazy(frozenset(where), lambda name: _read(where[name], name, pickles))


Pickles = Callable[[Path], dict[str, Tensor]]


def _names(path: Path, pickles: Pickles) -> list[str]:
    with _faults(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return list(file.keys())
        return list(pickles(path) if _is_old(path) else _unpickled(path))


def _read(path: Path, name: str, pickles: Pickles) -> Tensor:
    with _faults(path):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)
        return (pickles(path) if _is_old(path) else _unpickled(path))[name]


def _is_old(path: Path) -> bool:
    return not zipfile.is_zipfile(path)


def _unpickled(path: Path) -> dict[str, Tensor]:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=not _is_old(path))


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Faults of a file as CheckpointErrors that name it."""
    try:
        yield
    except (SafetensorError, OSError, RuntimeError, ValueError) as fault:
        raise CheckpointError(f"{path} cannot be read: {fault}") from None
    except Exception as fault:  # torch raises UnpicklingError and others for what it refuses
        raise CheckpointError(f"{path} is refused, as it holds more than tensors: {fault}") from None
