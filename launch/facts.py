"""What a run notes of where it computes and of what it reads, so that its records tell it when both are gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from headway.launch.assemble import Parts
from headway.parallel.checkpoint.manifest import read_manifest
from headway.pretrain import device as devices
from headway.pretrain.data.dataset import Dataset
from headway.pretrain.data.store import TokenStore
from headway.pretrain.records.report import environment


def machine(parts: Parts, checkpoint: Path | None) -> dict[str, Any]:
    """Where the run computes from now on, and, where it goes on from weights that were imported, whose they are.

    Args:
        checkpoint: from which the run goes on.
    """
    world = parts.world
    imported = read_manifest(checkpoint).numbers.get("imported") if checkpoint and world.main else None
    return {
        "device": devices.device_name(world.device),
        "ranks": world.size,
        "layout": str(world.layout),
        "precision": parts.hardware.precision,
        "environment": environment(),
        **({"imported": Path(imported).name} if imported else {}),
    }


def data(dataset: Dataset) -> dict[str, Any]:
    """What is read: of each source what it holds on both sides, and the tokenizer."""
    if dataset.prepared is None:
        return {"sources": [_images(dataset, place) for place in range(len(dataset.images))]}
    prepared, tokenizer = dataset.prepared, dataset.prepared.tokenizer
    marks = {built.train: built.heldout for built in prepared.built}
    sources = []
    for (name, samples, weight), (prefix, _) in zip(dataset.train, prepared.train, strict=True):
        heldout = marks.get(prefix)
        sources.append(
            {
                "name": name,
                "weight": weight,
                "samples": len(samples),
                "train": _side(prefix),
                "heldout": _side(heldout) if heldout else None,
                "skipped": TokenStore(prefix).facts.get("skipped"),
                "fingerprint": TokenStore(prefix).facts.get("mark"),
            }
        )
    told = {"kind": type(tokenizer).__name__, "vocab": tokenizer.vocab, "digest": tokenizer.digest}
    return {"sources": sources, "tokenizer": told}


def _side(prefix: Path) -> dict[str, Any]:
    store = TokenStore(prefix)
    counts = {"documents": store.documents, "tokens": store.tokens}
    return {**counts, "bytes": store.facts.get("utf8_bytes")}


def _images(dataset: Dataset, place: int) -> dict[str, Any]:
    source = dataset.images[place]
    name, samples, weight = dataset.train[place]
    heldout = len(source.names) - len(samples)
    return {
        "name": name,
        "weight": weight,
        "samples": len(samples),
        "train": {"images": len(samples)},
        "heldout": {"images": heldout} if heldout else None,
        "classes": source.classes,
        "skipped": source.skipped,
    }
