"""The folder of a run's checkpoints as rank 0 changes it: staging, publishing, and who may.

The order is what makes a kill harmless at any moment: shards are synced before the manifest is written, the
manifest before the staging folder gets its public name, and that name is durable before LATEST says it.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from headway.parallel.checkpoint.durable import (
    beside,
    exchange,
    remove_tree,
    sync_folder,
    write_new,
)
from headway.parallel.checkpoint.manifest import MANIFEST, Manifest
from headway.parallel.checkpoint.owner import Owner, Start
from headway.parallel.checkpoint.parts import part_name
from headway.parallel.checkpoint.retention import LATEST, TRASH, discard, folder_name
from headway.pretrain.errors import CheckpointError

STAGING = ".staging-"


class Folder:
    """A checkpoints folder, owned by the start of the run that came last (see `owner`).

    Args:
        path: the folder; made by `take_over`.
        token: names this run's staging folders; equal on all its ranks.
        start: which start of the job this is.
    """

    def __init__(self, path: Path, token: int, start: Start) -> None:
        self.path, self.token, self.owner = path, token, Owner(path, token, start)

    def staging(self, step: int, attempt: int) -> Path:
        """Where attempt number `attempt` of this run puts its files together."""
        return self.path / f"{STAGING}{folder_name(step)}-{self.token:016x}-{attempt}"

    def take_over(self) -> None:
        """Become the owner and remove what dead attempts left. Raises OSError, FencedError."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.owner.take()
        self._clean("")

    def open_staging(self, step: int, attempt: int) -> None:
        """Make the staging folder of an attempt and remove earlier ones. Raises OSError, CheckpointError."""
        if not self.owner.taken():  # someone removed the folder while the run went on
            self.take_over()
        self.owner.check()
        self._clean(f"-{self.token:016x}-")
        self.staging(step, attempt).mkdir()

    def publish(self, staging: Path, manifest: Manifest) -> Path:
        """Complete a staging folder and name it; returns the new path. Raises OSError, CheckpointError."""
        for rank in range(manifest.world):
            (staging / part_name(rank)).unlink()
        write_new(staging / MANIFEST, manifest.dump())
        check_sizes(staging, manifest)
        sync_folder(staging)
        self.owner.check()
        final = self.path / folder_name(manifest.step)
        pointer = beside(
            self.path / LATEST, f"{final.name}\n".encode()
        )  # while a full disk is still harmless
        if not (final.exists() and exchange(staging, final)):
            if (
                final.exists()
            ):  # a kill before the next line loses this step's older copy, no other checkpoint
                discard(final)
            staging.rename(final)
        sync_folder(self.path)
        os.replace(pointer, self.path / LATEST)
        sync_folder(self.path)
        check_sizes(final, manifest)
        if staging.exists():  # after an exchange: the older checkpoint of the same step
            discard(staging)
        return final

    def _clean(self, among: str) -> None:
        """Remove trash, and staging folders whose names contain `among`."""
        for name in os.listdir(self.path):
            if name.startswith(TRASH) or (name.startswith(STAGING) and among in name):
                remove_tree(self.path / name)


def new_token() -> int:
    """A random name for a run's staging folders, 62 bits, so that it travels as one int64."""
    return secrets.randbits(62)


def check_sizes(folder: Path, manifest: Manifest) -> None:
    """Every file is there with its size; raises CheckpointError naming the first that is not."""
    for name, file in manifest.files.items():
        found = (folder / name).stat().st_size
        if found != file.bytes:
            raise CheckpointError(f"{folder / name}: has {found} bytes after writing {file.bytes}.")
