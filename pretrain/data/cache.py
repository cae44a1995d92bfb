"""What was built is kept, in a folder named by a fingerprint of all that went in, whole or not at all."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from headway.pretrain.errors import DataError
from headway.pretrain.files import sync_folder


def fingerprint(**parts: Any) -> str:
    """Name of what is built from `parts` (JSON values): 24 hexadecimal digits of their SHA-256."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def build_once(folder: Path, build: Callable[[Path], None]) -> bool:
    """Have `build` fill `folder`, unless that was done; of several processes one builds, the others wait.

    A folder of this name is always complete: files are written beside it and arrive by one rename. What a
    killed build leaves is hidden and removed by the next.

    Args:
        build: fills the folder that it is given, and has its files on disk when it returns.

    Returns:
        Whether this call built it.

    Raises:
        DataError: the disk is full or cannot be written; and whatever `build` raises.
    """
    if folder.is_dir():
        return False
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder.with_name(f".{folder.name}.lock")):
            if folder.is_dir():
                return False
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                build(unfinished)
                os.replace(unfinished, folder)
            except BaseException:
                shutil.rmtree(unfinished, ignore_errors=True)
                raise
            sync_folder(folder.parent)
    except OSError as fault:
        raise DataError(
            f"{folder}: cannot be written: {fault} (data.cache, or $HEADWAY_CACHE, moves it)"
        ) from fault
    return True


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of this file; the kernel releases it if the process dies."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that builds {path.parent}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
