"""The parts of a cache, and how they become a whole."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from headway.pretrain.data.teacher_cache.contents import MANIFEST, PART, Contents, read_contents
from headway.pretrain.data.teacher_cache.disk import disk_errors, sync_folder, write_synced
from headway.pretrain.data.teacher_cache.index import Index, extended
from headway.pretrain.data.teacher_cache.shards import Shards
from headway.pretrain.errors import DataError


def staging(folder: Path) -> Path:
    """Where a cache is put together until it is whole."""
    return folder.with_name(f".{folder.name}.unfinished")


def part_name(part: int) -> str:
    """Folder of a part, within the cache's."""
    return f"part_{part:04d}"


def read_parts(root: Path, expected: Contents) -> dict[str, Contents]:
    """What the parts of an unfinished cache hold, by names of their folders, in order of these.

    Raises:
        DataError: a `part.json` is damaged.
        JobError: a part has another identity or other fields than expected.
    """
    parts = {}
    for path in sorted(root.glob(f"part_*/{PART}")):
        found = read_contents(path)
        found.check(path.parent, expected.identity)
        found.check_fields(path.parent, expected.fields)
        parts[path.parent.name] = found
    return parts


def publish(folder: Path, expected: Contents, count: int) -> Path:
    """Join all parts of the unfinished cache, index them, and give the folder its name.

    The order makes a kill harmless at any moment: shards are on disk before a `part.json` lists them, index and
    manifest before the folder gets its name, and the lists of parts, from which all could be made again, go last.

    Args:
        folder: the cache to be.
        expected: identity and fields.
        count: parts 0 to `count` - 1 must be complete.

    Raises: as `CacheWriter.publish`.
    """
    root = staging(folder)
    parts = read_parts(root, expected)
    for part in range(count):
        found = parts.get(part_name(part))
        if found is None or not found.complete:
            state = (
                "is missing"
                if found is None
                else "is not complete: its process is still writing, or was killed"
            )
            raise DataError(f"{root / part_name(part)}: the part {state}; go on with CacheWriter.resume")
    shards = Shards(root, expected.fields, tuple(shard for found in parts.values() for shard in found.shards))
    index = extended(Index(), shards, range(len(shards.shards)))
    if not len(index):
        raise DataError(f"{root}: nothing was written, and a cache has one row at least")
    with disk_errors(folder):
        _remove_unlisted(root, {shard.file for shard in shards.shards})
        whole = replace(
            expected, shards=tuple(shards.shards), rows=len(index), index=index.write(root), complete=True
        )
        write_synced(root / MANIFEST, [memoryview(whole.dump())])
        root.rename(folder)
        sync_folder(folder.parent)
        for name in parts:
            (folder / name / PART).unlink()
            with suppress(OSError):  # only of a part that has no shards
                (folder / name).rmdir()
    return folder


def _remove_unlisted(root: Path, listed: set[str]) -> None:
    """Remove what processes were writing when they were killed."""
    for path in root.glob("part_*/*"):
        if path.name != PART and str(path.relative_to(root)) not in listed:
            path.unlink()
