"""`headway checkpoint import` and `headway export`: models between Hugging Face and Headway."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.launch.start_from import fill, find_checkpoint
from headway.parallel.checkpoint.load import load
from headway.parallel.checkpoint.manifest import read_manifest
from headway.parallel.checkpoint.save import Checkpointer
from headway.pretrain import config
from headway.pretrain.config import Job
from headway.pretrain.data.build import train_tokenizer
from headway.pretrain.data.tokenizer import Tokenizer, load_tokenizer
from headway.pretrain.engine import State
from headway.pretrain.errors import HeadwayError, JobError
from headway.pretrain.files import publish
from headway.pretrain.hf import family_of_job
from headway.pretrain.hf.folder import Folder, is_folder, open_folder, read_json, tree_of
from headway.pretrain.hf.links import Lazy
from headway.pretrain.hf.tokenizers import copy_tokenizer, find_tokenizer, write_tokenizer
from headway.pretrain.hf.writing import inputs_of, write_folder
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.objectives import build_objective
from headway.pretrain.recipe import Resolved, dump, leaves, validate


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
    job, notes = imported_job(folder, run)
    tensors, more = imported_weights(folder, job)
    publish_run(run, job, tensors, source=str(place.resolve()), settings=set(folder.settings))
    for note in [*notes, *more, *(f"{name} is not used" for name in folder.left_over())]:
        print(f"  {note}")
    count = sum(t.numel() for t in tensors.values())
    print(f"{run}: {folder.family.model_type}, {len(tensors)} tensors, {count:,} parameters")
    print(f"go on with: headway train {run / 'job.yaml'} YOUR.yaml --set train.start_from={run}")


def imported_job(folder: Folder, run: Path) -> tuple[Job, list[str]]:
    """The job of an imported model; copies its tokenizer into the run folder."""
    tree: dict[str, Any] = tree_of(folder.settings)
    tree["run"] = {"name": run.resolve().name, "dir": str(run.parent)}
    data, notes = tree.setdefault("data", {}), []
    run.mkdir(parents=True, exist_ok=True)
    if tree["model"]["family"] == "vit":
        if (folder.path / "preprocessor_config.json").is_file():
            found = read_json(folder.path / "preprocessor_config.json")
            pairs = (("mean", "image_mean"), ("std", "image_std"))
            data["images"] |= {ours: found[theirs] for ours, theirs in pairs if found.get(theirs)}
    elif tokenizer := find_tokenizer(folder.path):
        copy_tokenizer(folder.path, run / "tokenizer")
        path = (run / "tokenizer" / tokenizer.file).resolve()
        data["tokenizer"] = {"kind": tokenizer.kind, "path": str(path)}
    else:
        notes.append("no tokenizer.json and no SentencePiece model: give data.tokenizer before you train")
    return validate(tree), notes


def imported_weights(folder: Folder, job: Job) -> tuple[dict[str, Tensor], list[str]]:
    """All weights of a job's objective, and what a person should know of them."""
    found = dict(folder.tensors())
    inputs = inputs_of(job, {name: tuple(t.shape) for name, t in found.items()})
    objective = build_objective(job, inputs.vocab, device="meta")
    names = {name for name, _ in objective.named_parameters()}
    if names - found.keys():  # a head is missing: it gets its initial weights
        objective = build_objective(job, inputs.vocab)
    else:
        objective = objective.to_empty(device="cpu")
    weights = {name: p.detach() for name, p in objective.named_parameters()}
    if any(t.dtype == torch.float64 for t in found.values()):
        weights = {name: t.double() for name, t in weights.items()}
    return weights, fill(weights, found.items(), str(folder.path), job)


def publish_run(run: Path, job: Job, tensors: dict[str, Tensor], source: str, settings: set[str]) -> None:
    """Write the recipe and the checkpoint of step 0."""
    origin = {
        name: "import" for name, _ in leaves(job) if name in settings or name.startswith("data.tokenizer.")
    }
    publish(run / "job.yaml", dump(Resolved(job, origin)))
    with Checkpointer(run / "checkpoints", background=False) as checkpointer:
        state = State(tensors, {"step": 0, "imported": source})
        checkpointer.save(0, state, job.model_dump(mode="json"))
        if checkpointer.problems:
            raise checkpointer.problems[0]


def export_model(place: str, kind: str, to: str) -> None:
    """Write a run's newest checkpoint, or a given one, as a folder that `from_pretrained` loads.

    Raises:
        JobError: Hugging Face has no such model, or the folder exists.
        CheckpointError: there is no whole checkpoint.
    """
    check_kind("--to", kind)
    target = Path(to)
    check_new("DIR", target)
    path = find_checkpoint(place)
    manifest = read_manifest(path)
    job = validate(manifest.job)
    entries = {n: e for n, e in manifest.tensors.items() if not n.startswith("optimizer.")}
    tensors = {n: torch.empty(e.shape, dtype=getattr(torch, e.dtype)) for n, e in entries.items()}
    load(path, State(tensors), strict=False)
    family_of_job(job).to_hf(job, Inputs())  # says what does not fit before anything is written
    ids, notes = write_companions(target, job)
    shapes = {name: entry.shape for name, entry in entries.items()}
    write_folder(target, job, Lazy(frozenset(tensors), tensors.__getitem__), shapes, ids)
    for note in notes:
        print(f"  {note}")
    print(f"{target}: {len(tensors)} tensors of {path}")


def find_job_tokenizer(job: Job) -> tuple[Path | None, Tokenizer]:
    """The tokenizer of a job and its file, if it has one; found in the cache or trained, if none was named."""
    settings = job.data.tokenizer
    path = Path(settings.path).expanduser() if settings.path else None
    if settings.kind == "sentencepiece" and path is None:
        path = train_tokenizer(job.data, progress=False)
    return path, load_tokenizer(settings, path)


def write_companions(target: Path, job: Job) -> tuple[dict[str, Any], list[str]]:
    """Write what stands beside the weights: the tokenizer, or how pixels are normalised.

    Returns:
        Keys of config.json that name special tokens, and what a person should know.
    """
    target.mkdir(parents=True, exist_ok=True)
    if job.model.family == "vit":
        write_json(target / "preprocessor_config.json", preprocessor(job.data.images))
        return {}, []
    try:
        path, tokenizer = find_job_tokenizer(job)
    except HeadwayError as fault:
        return {}, [f"no tokenizer is written: {fault}"]
    note = write_tokenizer(target, job.data.tokenizer.kind, path)
    ids = {"bos_token_id": tokenizer.separator, "eos_token_id": tokenizer.separator}
    if job.model.family == "gpt":
        write_json(target / "generation_config.json", ids)
    return ids, [note] if note else []


def preprocessor(images: config.Images) -> dict[str, Any]:
    """The preprocessor_config.json of transformers' ViTImageProcessor."""
    mean, std = (list(v) * (images.channels if len(v) == 1 else 1) for v in (images.mean, images.std))
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": images.size, "width": images.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
    }


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def check_kind(option: str, kind: str) -> None:
    """Hugging Face is the one other house that Headway knows."""
    if kind != "hf":
        raise JobError(option, kind, "Headway exchanges models with Hugging Face", "hf")


def check_new(option: str, folder: Path) -> None:
    """Nothing is written over."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise JobError(option, str(folder), "exists and is not empty; name another folder, or remove it")
