"""Files that appear whole or not at all, and names that last."""

from __future__ import annotations

import errno
import os
from pathlib import Path


def publish(path: Path, text: str) -> None:
    """Write a text file under a name of its own, then give it its name: readers never see a part of it."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable. File systems that cannot sync folders (some in FUSE) pass."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def cache_folder(setting: str | None = None) -> Path:
    """Where what can be made again is kept: the setting, else $HEADWAY_CACHE, else headway in the user's cache."""
    chosen = setting or os.environ.get("HEADWAY_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headway"
