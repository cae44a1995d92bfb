"""Files that survive a power cut: written, synced and renamed in the order that makes it true."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from headway.pretrain.errors import CheckpointError
from headway.pretrain.files import sync_folder

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100


@contextmanager
def disk_errors(path: Path, task: str, needed: int = 0) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that names the path, the bytes needed and the bytes free."""
    try:
        yield
    except OSError as error:
        folder = path
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        try:
            room = f" {shutil.disk_usage(folder).free:,} bytes are free there."
        except OSError:
            room = ""
        need = f" It takes {needed:,} bytes;" if needed else ""
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(path) else ""
        raise CheckpointError(f"{path}: cannot {task}: {reason}{where}.{need}{room}") from error


def write_new(path: Path, data: bytes) -> None:
    """Write and sync a file that does not exist yet."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, data: bytes) -> None:
    """Put a file in place of another: at any moment one of the two is there, whole."""
    os.replace(beside(path, data), path)
    sync_folder(path.parent)


def beside(path: Path, data: bytes) -> Path:
    """Write and sync what will replace `path`; a rename, which needs no space, is then all that is left."""
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    try:
        write_new(fresh, data)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    return fresh


def exchange(one: Path, other: Path) -> bool:
    """Swap two folders of one file system in one step; False where the system cannot (Linux renameat2)."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def remove_tree(path: Path) -> None:
    """Remove a folder as far as the disk allows; what stays carries a name that nobody reads."""
    shutil.rmtree(path, ignore_errors=True)
