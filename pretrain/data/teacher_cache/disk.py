"""Files of a cache that survive a power cut, and what is wrong with those that did not."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from headway.pretrain.errors import DataError
from headway.pretrain.files import sync_folder

_BLOCK = 8 << 20


def write_synced(path: Path, blocks: Sequence[memoryview]) -> str:
    """Write blocks of bytes and have file and name on the disk; returns the sha256. Raises OSError."""
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for block in blocks:
            digest.update(block)
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)
    return digest.hexdigest()


def replace_synced(path: Path, data: bytes) -> None:
    """Put a file in place of another: at any moment one of the two is there, whole. Raises OSError."""
    fresh = path.with_name(f".{path.name}.new")
    write_synced(fresh, [memoryview(data)])
    os.replace(fresh, path)
    sync_folder(path.parent)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into a DataError that names the path."""
    try:
        yield
    except OSError as fault:
        raise DataError(f"{path}: cannot be written: {fault}; free space, or write elsewhere") from fault


def size_problem(path: Path, expected: int) -> str | None:
    """What is wrong with a file that has to have this many bytes; None if nothing is."""
    try:
        found = path.stat().st_size
    except OSError as fault:
        return f"{path}: cannot be read: {fault.strerror}"
    return (
        None if found == expected else f"{path}: truncated or damaged: {found} bytes, {expected} were written"
    )


def digest_problem(path: Path, expected: str) -> str | None:
    """What is wrong with a file that has to have this sha256; None if nothing is. Reads all of it."""
    digest = hashlib.sha256()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as fault:
        return f"{path}: cannot be read: {fault.strerror}"
    found = digest.hexdigest()
    return None if found == expected else f"{path}: damaged: sha256 is {found}, {expected} was written"


def check_size(path: Path, expected: int) -> None:
    """Raise DataError if the file is missing or has another size."""
    if problem := size_problem(path, expected):
        raise DataError(f"{problem}; copy it again, or make the cache again")
