"""`headway launch slurm`: check the job, write its script, submit it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

from headway.launch import run as runs
from headway.launch.assemble import run_folder
from headway.launch.resume import set_aside
from headway.launch.slurm import client, jobs
from headway.launch.slurm.request import Request
from headway.launch.slurm.script import Point, render, sweep_points
from headway.pretrain.errors import JobError
from headway.pretrain.files import publish
from headway.pretrain.recipe import resolve

SCRIPT = "job.sbatch"


def launch(
    recipes: Sequence[str],
    sets: Sequence[str],
    request: Request,
    *,
    chain: int = 1,
    sweeps: Sequence[str] = (),
    parallel: int | None = None,
    template: str | None = None,
    fresh: bool = False,
    dry_run: bool = False,
) -> None:
    """Submit a run: one job, a chain of jobs of which each goes on where the last one stopped, or an array.

    Raises:
        JobError, InvalidJob: the job cannot run so; nothing was submitted.
        SlurmError: Slurm refused.
    """
    job = resolve(recipes, sets).job
    folder = run_folder(job)
    points = sweep_points(sweeps, job.run.name, Path(job.run.dir))
    if chain > 1 and points:
        raise JobError("--chain", chain, "jobs of a sweep are requeued one by one, and make no chain", 1)
    if parallel and not points:
        raise JobError("--sweep-parallel", parallel, "has no effect without --sweep")
    device = "cuda" if request.gpus_per_node else "cpu"
    grouped = points and job.tracking.group is None and job.tracking.wandb != "off"
    group = [f"tracking.group={job.run.name}"] if grouped else []
    for point in points or [Point((), folder)]:
        runs.check(recipes, [*sets, *group, *point.sets], request.ranks, device)
    arguments = [*recipes, *(word for one in [*sets, *group] for word in ("--set", one))]
    text = render(
        request,
        arguments,
        folder,
        job.run.name,
        points=points,
        parallel=parallel,
        links=chain,
        template=template,
    )
    if dry_run:
        print(text, end="")
        return
    if fresh:
        for place in [point.folder for point in points] or [folder]:
            if aside := set_aside(place):
                print(f"{place} was set aside as {aside}")
    path = write(folder, text)
    submit(path, folder, chain, points)


def write(folder: Path, text: str) -> Path:
    """Put the script into the run folder, executable; its path."""
    place = jobs.slurm_folder(folder)
    place.mkdir(parents=True, exist_ok=True)
    path = place / SCRIPT
    publish(path, text)
    os.chmod(path, 0o755)
    return path


def submit(path: Path, folder: Path, chain: int, points: Sequence[Point]) -> None:
    """Hand the script to Slurm as often as the chain has links, each to begin when the one before has ended."""
    for place in [point.folder for point in points] or [folder]:
        with contextlib.suppress(FileNotFoundError):
            (jobs.slurm_folder(place) / jobs.CANCELLED).unlink()
    before: str | None = None
    for link in range(chain):
        after = [f"--dependency=afterany:{before}"] if before else []
        job = client.submit(str(path), *after)
        places = {"runs": [str(point.folder) for point in points]} if points else {}
        jobs.note(folder, "submitted", job=job, **({"after": before} if before else {}), **places)
        for index, point in enumerate(points):
            log = jobs.slurm_folder(folder) / f"{job}_{index}.log"
            jobs.note(point.folder, "submitted", job=f"{job}_{index}", log=str(log))
        shown = (
            f"link {link + 1} of {chain}" if chain > 1 else f"{len(points)} runs" if points else "submitted"
        )
        print(f"job {job}  {shown}")
        before = job
    print(f"script  {path}\nlogs    {folder / 'slurm'}\nnow     headway launch status {folder}")
