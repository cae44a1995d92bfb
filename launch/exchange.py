"""`headway checkpoint import` and `headway export`: models between Hugging Face and Headway."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from headway.launch.card import write_for_export
from headway.launch.companions import find_specials, special_ids, write_companions
from headway.launch.start_from import AVERAGE, fill, find_checkpoint, is_weight
from headway.parallel.checkpoint.load import read
from headway.parallel.checkpoint.manifest import Manifest, read_manifest
from headway.parallel.checkpoint.save import Checkpointer
from headway.parallel.checkpoint.verify import verify
from headway.pretrain.config import Job
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError, JobError
from headway.pretrain.files import publish
from headway.pretrain.hf import family_of_job
from headway.pretrain.hf.folder import Folder, is_folder, open_folder, read_json, tree_of
from headway.pretrain.hf.links import Lazy
from headway.pretrain.hf.tokenizers import copy_tokenizer, find_tokenizer
from headway.pretrain.hf.writing import inputs_of, write_folder
from headway.pretrain.objectives import build_objective
from headway.pretrain.recipe import validate


def import_model(kind: str, source: str, out: str | None) -> None:
    """Turn a folder of Hugging Face into a run folder, and say what was found.

    Raises:
        JobError: the folder holds no model that Headway knows, or the run folder exists.
        CheckpointError: the weights are unreadable or incomplete.
    """
    check_kind("--from", kind)
    place = Path(source)
    if not is_folder(place):
        raise JobError("DIR", source, "must be a folder with config.json and model.safetensors")
    folder = open_folder(place)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", place.resolve().name).strip("-.") or "imported"
    run = Path(out) if out else Path("runs") / name
    check_new("--out", run)
    tree, notes = imported_recipe(folder, run)
    job = validate(tree)
    tensors, more = imported_weights(folder, job)
    run.mkdir(parents=True, exist_ok=True)
    if job.data.tokenizer.path:
        copy_tokenizer(folder.path, run / "tokenizer")
    publish_run(run, tree, tensors, source=str(place.resolve()))
    for note in [*notes, *more, *(f"{name} is not used" for name in folder.left_over())]:
        print(f"  {note}")
    count = sum(t.numel() for t in tensors.values())
    print(f"{run}: {folder.family.model_type}, {len(tensors)} tensors, {count:,} parameters")
    print(f"go on with: headway train {run / 'job.yaml'} YOUR.yaml --set train.start_from={run}")


def imported_recipe(folder: Folder, run: Path) -> tuple[dict[str, Any], list[str]]:
    """The recipe of an imported model, whose tokenizer will lie in the run folder; what a person should know."""
    tree: dict[str, Any] = tree_of(folder.settings)
    tree["run"] = {"name": run.resolve().name, "dir": str(run.parent)}
    data, notes = tree.setdefault("data", {}), []
    if folder.source.read(min(folder.source.names)).dtype == torch.float64:
        tree["precision"] = "fp64"
    if tree["model"]["family"] == "vit":
        if (folder.path / "preprocessor_config.json").is_file():
            found = read_json(folder.path / "preprocessor_config.json")
            pairs = (("mean", "image_mean"), ("std", "image_std"))
            data["images"] |= {ours: found[theirs] for ours, theirs in pairs if found.get(theirs)}
    elif tokenizer := find_tokenizer(folder.path):
        path = (run / "tokenizer" / tokenizer.file).resolve()
        data["tokenizer"] = {"kind": tokenizer.kind, "path": str(path)}
    else:
        notes.append("no tokenizer.json and no SentencePiece model: give data.tokenizer before you train")
    return tree, notes


def imported_weights(folder: Folder, job: Job) -> tuple[dict[str, Tensor], list[str]]:
    """All weights of a job's objective, and what a person should know of them."""
    shapes = folder.shapes()
    inputs = inputs_of(job, shapes)
    objective = build_objective(job, inputs, device="meta")
    names = {name for name, _ in objective.named_parameters()}
    if names - shapes.keys():  # a head is missing: it gets its initial weights
        objective = build_objective(job, inputs)
    else:
        objective = objective.to_empty(device="cpu")
    weights = {name: p.detach() for name, p in objective.named_parameters()}
    return weights, fill(weights, folder.tensors(), str(folder.path), job)


def publish_run(run: Path, tree: dict[str, Any], tensors: dict[str, Tensor], source: str) -> None:
    """Write the recipe, which holds what the folder says and leaves out the rest, and the checkpoint of step 0."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    publish(run / "job.yaml", f"# Imported from {source}.\n{text}")
    with Checkpointer(run / "checkpoints", background=False) as checkpointer:
        state = State(tensors, {"step": 0, "imported": source})
        checkpointer.save(0, state, validate(tree).model_dump(mode="json"))
        if checkpointer.problems:
            raise checkpointer.problems[0]


def export_model(place: str, kind: str, to: str, average: bool = False) -> None:
    """Write a run's newest checkpoint, or a given one, as a folder that `from_pretrained` loads.

    Args:
        average: write the averages of the weights (optimizer.ema) in their stead.

    Raises:
        JobError: Hugging Face has no such model, there are no averages, or the folder exists.
        CheckpointError: there is no whole checkpoint, or a tensor has no place there.
    """
    check_kind("--to", kind)
    target, path = Path(to), find_checkpoint(place)
    check_new("DIR", target)
    manifest = read_manifest(path)
    job = validate(manifest.job)
    source, outline = stored_weights(path, manifest, AVERAGE if average else "")
    if not source.names:
        raise JobError("--average", True, "the checkpoint has no averages: optimizer.ema was not set")
    specials, file, notes = find_specials(job)
    ids = special_ids(job, specials) if specials else {}
    if problems := verify(path):
        raise CheckpointError(f"{path} is not whole: {'; '.join(map(str, problems))}")
    write_folder(target, job, source, outline, ids)
    notes += write_companions(target, job, specials, file)
    notes += [note] if (note := write_for_export(path, target, average)) else []
    if not average and any(name.startswith(AVERAGE) for name in manifest.tensors):
        notes.append("these are the weights; evaluation uses their averages, which --average exports")
    for note in notes:
        print(f"  {note}")
    print(f"{target}: {family_of_job(job).model_type}, {len(source.names)} tensors of {path}")


def stored_weights(path: Path, manifest: Manifest, prefix: str) -> tuple[Lazy, Lazy]:
    """All weights of a checkpoint, or what stands under `prefix` and their names: each read when it is asked for, and
    the same without values."""
    names = {
        name.removeprefix(prefix): name
        for name in manifest.tensors
        if name.startswith(prefix) and is_weight(name.removeprefix(prefix))
    }

    def empty(name: str, device: str) -> Tensor:
        entry = manifest.tensors[names[name]]
        return torch.empty(entry.shape, dtype=getattr(torch, entry.dtype), device=device)

    def value(name: str) -> Tensor:
        tensor = empty(name, "cpu")
        read(path, {names[name]: tensor})
        return tensor

    return Lazy(frozenset(names), value), Lazy(frozenset(names), lambda name: empty(name, "meta"))


def check_kind(option: str, kind: str) -> None:
    """Hugging Face is the one other house that Headway knows."""
    if kind != "hf":
        raise JobError(option, kind, "Headway exchanges models with Hugging Face", "hf")


def check_new(option: str, folder: Path) -> None:
    """Nothing is written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(option, str(folder), "exists and is not empty; name another folder, or remove it")
