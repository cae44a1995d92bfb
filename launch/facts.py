"""What a run is beside its job and its place: sizes, versions, and the data that it reads, so that its records tell it
when both are gone."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from headway.launch.assemble import Parts
from headway.pretrain.data.dataset import Dataset
from headway.pretrain.data.store import TokenStore, part


def facts(parts: Parts) -> dict[str, Any]:
    """Plain values: FLOPs, whether it is compiled, versions, the data."""
    hardware, job = parts.hardware, parts.job
    return {
        "flops_per_row": parts.yardstick.flops_per_row,
        "compiled": hardware.compiled,
        "peak_flops": hardware.peak,
        "tokens_per_step": job.train.global_batch * job.row_tokens,
        "versions": {"python": platform.python_version()} | {n: _version(n) for n in ("headway", "torch")},
        "data": data(parts.dataset)["sources"],
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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
                "uri": part(prefix.resolve(), ".bin").as_uri(),
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
