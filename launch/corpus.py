"""`headway data` and `headway tokenizer`: build and inspect what a run reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from headway.launch.console import console
from headway.pretrain import config
from headway.pretrain.data.build import prepare_data
from headway.pretrain.data.build import train_tokenizer as train_on
from headway.pretrain.data.dataset import open_dataset
from headway.pretrain.data.store import TokenStore, summary
from headway.pretrain.data.tokenizer import load_tokenizer
from headway.pretrain.recipe import resolve, validate


def build(recipes: Sequence[str], sets: Sequence[str]) -> None:
    """Build what a recipe reads, or find it in the cache, and say what it is and where it lies."""
    job = resolve(recipes, sets).job
    if job.model.family == "vit":
        print(*open_dataset(job).notes, sep="\n")
        return
    prepared = prepare_data(job.data)
    prefixes = [("train", prefix) for prefix, _ in prepared.train]
    prefixes += [("train targets", prefix) for prefix in prepared.train_targets if prefix]
    prefixes += [("held-out", prefix) for prefix in prepared.heldout]
    prefixes += [("held-out targets", prefix) for prefix in prepared.heldout_targets if prefix]
    for kind, prefix in prefixes:
        store = TokenStore(prefix)
        print(f"{kind}: {store.documents:,} documents, {store.tokens:,} tokens  {prefix}")
    for built in prepared.built:
        if built.skipped:
            print(f"left out {built.skipped} malformed lines:", *built.skipped_first, sep="\n  ")


def inspect(prefix: str) -> None:
    """Print what a store holds."""
    table = Table(box=None, show_header=False)
    for name, value in summary(prefix).items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    console().print(table)


def train_tokenizer(out: str, sources: Sequence[str], vocab: int) -> None:
    """Train a SentencePiece tokenizer on sources and write it to a file."""
    job = validate({"data": {"sources": list(sources), "heldout": 0.0, "tokenizer": {"vocab": vocab}}})
    print(train_on(job.data, Path(out)))


def encode(path: str, text: str) -> None:
    """Print the pieces of a text with their ids."""
    settings = {"kind": "bytes"} if path == "bytes" else {"kind": _kind(path), "path": path}
    tokenizer = load_tokenizer(config.Tokenizer.model_validate(settings))
    ids = tokenizer.encode(text)
    console().print(" ".join(f"{i}:{tokenizer.decode([i])!r}" for i in ids), markup=False)
    print(f"{len(text.encode())} bytes, {len(ids)} tokens")


def _kind(path: str) -> str:
    return "huggingface" if path.endswith(".json") else "sentencepiece"
