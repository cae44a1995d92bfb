"""`headway data` and `headway tokenizer`: build and inspect what a run reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from headway.launch.console import console
from headway.pretrain.data.build import prepare_data
from headway.pretrain.data.store import TokenStore
from headway.pretrain.data.tokenizer import load_tokenizer
from headway.pretrain.recipe import resolve


def build(recipes: Sequence[str], sets: Sequence[str]) -> None:
    """Build what a recipe reads, or find it in the cache, and say where it lies."""
    prepared = prepare_data(resolve(recipes, sets).job.data)
    for part in prepared.parts:
        for kind, prefix in (("train", part.train), ("held-out", part.heldout)):
            if prefix:
                store = TokenStore(prefix)
                print(f"{part.name}  {kind}: {store.documents:,} documents, {store.tokens:,} tokens  {prefix}")
