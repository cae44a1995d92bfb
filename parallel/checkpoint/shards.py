"""Shard files: a piece's key in them, and what is read of them as they are. `tensor_files.py` writes them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from headway.parallel.checkpoint.boxes import Box
from headway.pretrain.tensor_files import BLOCK


def key_of(name: str, box: Box, shape: tuple[int, ...]) -> str:
    """Key of a piece in its shard file: the plain name if it is the whole tensor, else `name[0:4,8:16]`."""
    return name if box == Box.whole(shape) else f"{name}{box}"


def blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file in blocks."""
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            yield block


def sha256(path: Path) -> str:
    """Digest of a file, in hex. Raises OSError."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()
