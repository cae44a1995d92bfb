"""`stdlib:`, the corpus that is on every machine: the Python sources of the running interpreter's library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from headway.pretrain.errors import DataError

LEFT_OUT = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"})
"""Folders whose files are no part of the corpus: tests (two thirds of the text), installed packages."""


def stdlib_sources(root: Path | None = None) -> Iterator[tuple[Path, str]]:
    """The library's `.py` files, about 11 MB, as (path, name relative to the library), sorted by name.

    Args:
        root: the library's folder; that of the running Python if not given.

    Raises:
        DataError: the folder has no sources (an embedded or frozen Python).
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    kept: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - LEFT_OUT
        kept += (Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py"))
    if not kept:
        raise DataError(
            f"stdlib:: {root} holds no Python sources; install the library's .py files or name other data"
        )
    for name in sorted(kept):
        yield root / name, name
