"""The commands that need a whole run: train, eval, look."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from headway.launch import assemble as rooms
from headway.launch.assemble import Parts, run_folder
from headway.launch.finish import finish
from headway.launch.resume import check_resumable, set_aside
from headway.launch.signals import StopRequest
from headway.parallel import mesh
from headway.parallel.checkpoint import Checkpointer, latest, load, newest_good
from headway.pretrain.engine import State
from headway.pretrain.errors import CheckpointError, JobError
from headway.pretrain.inert import inert, refuse_inert
from headway.pretrain.recipe import Resolved, dump, load_job, resolve
from headway.pretrain.records import open_records, peak_memory_gib
from headway.pretrain.trainer import Trainer


def train(recipes: Sequence[str], sets: Sequence[str], *, fresh: bool = False) -> None:
    """Train a job, or go on with it where its run folder stands."""
    resolved = resolve(recipes, sets)
    refuse_inert(resolved)
    folder = run_folder(resolved.job)
    world = rooms.join(resolved.job)
    with ExitStack() as stack:
        stack.callback(mesh.stop)
        if fresh:
            if world.main and (aside := set_aside(folder)):
                print(f"{folder} was set aside as {aside}")
            world.barrier()
        notes = check_saved_job(folder, resolved)
        world.barrier()
        parts = rooms.assemble(resolved, world)
        stack.callback(parts.corpus.loader.close)
        if world.main:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "job.yaml").write_text(dump(resolved), encoding="utf-8")
            tell(parts, notes)
        run(parts, folder, stack)
