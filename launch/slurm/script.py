"""The batch script of a run, from a template that a user may own a copy of."""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import jinja2

from headway.launch.local import headway_script
from headway.launch.slurm.request import Request
from headway.pretrain.errors import JobError

TEMPLATE = "slurm.sbatch.j2"


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        sets: what differs from the recipe, as `--set` takes it; `run.name` among it.
        folder: its run folder.
    """

    sets: tuple[str, ...]
    folder: Path

    @property
    def arguments(self) -> str:
        return shlex.join(word for one in self.sets for word in ("--set", one))


def sweep_points(sweeps: Sequence[str], name: str, runs: Path) -> list[Point]:
    """All combinations of `a.b=1,2,3`, each a run called `NAME-0`, `NAME-1`...

    Raises:
        JobError: a sweep without values, or a setting that is swept twice.
    """
    axes: dict[str, list[str]] = {}
    for sweep in sweeps:
        key, _, listed = sweep.partition("=")
        values = _split(listed)
        if not key or not all(values):
            raise JobError("--sweep", sweep, "must name a setting and its values", "optimizer.lr=1e-3,3e-4")
        if key in axes or key in ("run.name", "run.dir"):
            raise JobError(
                "--sweep", sweep, f"{key} is set already: by another --sweep, or by the sweep itself"
            )
        axes[key] = values
    if not axes:
        return []
    points = []
    for index, chosen in enumerate(itertools.product(*axes.values())):
        sets = tuple(f"{key}={value}" for key, value in zip(axes, chosen, strict=True))
        points.append(Point((*sets, f"run.name={name}-{index}"), runs / f"{name}-{index}"))
    return points


def _split(listed: str) -> list[str]:
    """Values between commas; commas within brackets do not part."""
    values, depth = [""], 0
    for sign in listed:
        depth += (sign in "[{") - (sign in "]}")
        if sign == "," and depth == 0:
            values.append("")
        else:
            values[-1] += sign
    return values


def template_text(path: str | None = None) -> str:
    """The template: a user's own, or Headway's; raises JobError if there is no such file."""
    if path is None:
        return files("headway.launch").joinpath("templates", TEMPLATE).read_text(encoding="utf-8")
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise JobError("--template", path, error.strerror or str(error)) from None


def render(
    request: Request,
    train: Sequence[str],
    run: Path,
    name: str,
    *,
    points: Sequence[Point] = (),
    parallel: int | None = None,
    links: int = 1,
    template: str | None = None,
) -> str:
    """The text of the script.

    Args:
        train: arguments of `headway train`, as the user gave them.
        run: the run's folder; its `slurm` folder gets the logs.
        name: of the run and of the job.
        points: runs of a sweep; the job is an array of them then.
        parallel: how many of them may run at once.
        links: jobs of the chain; with more than one a job that has saved leaves the rest to the next.
        template: file of a user's own template.

    Raises:
        JobError: a template that does not exist or cannot be filled in.
    """
    headway = "headway" if request.container else headway_script()
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["quote"] = lambda value: shlex.quote(str(value))
    try:
        return environment.from_string(template_text(template)).render(
            r=request,
            name=name,
            run=str(run),
            folder=os.getcwd(),
            log=str(run / "slurm" / ("%A_%a.log" if points else "%j.log")),
            headway=headway,
            srun=shlex.join(["srun", "--kill-on-bad-exit=1", *srun_arguments(request)]),
            inside=shlex.join(inside(request)),
            torchrun=str(Path(headway).with_name("torchrun")),
            train=shlex.join([headway, "train", *train]),
            points=points,
            parallel=parallel,
            links=links,
        )
    except jinja2.TemplateError as error:
        raise JobError(
            "--template", template, f"cannot be filled in: {error}", "a copy of `headway launch template`"
        ) from None


def srun_arguments(request: Request) -> list[str]:
    """Of the step that starts the ranks."""
    mounts = [f"{Path.cwd()}:{Path.cwd()}", *request.container_mounts]
    pyxis = [
        f"--container-image={request.container}",
        f"--container-mounts={','.join(mounts)}",
        f"--container-workdir={Path.cwd()}",
    ]
    inside_pyxis = request.container is not None and request.container_runtime == "pyxis"
    return [*(pyxis if inside_pyxis else []), *request.srun]


def inside(request: Request) -> list[str]:
    """The command that opens the container, for those that srun does not open."""
    if request.container is None or request.container_runtime != "apptainer":
        return []
    mounts = [word for mount in [str(Path.cwd()), *request.container_mounts] for word in ("--bind", mount)]
    gpus = ["--nv"] if request.gpus_per_node else []
    return ["apptainer", "exec", *gpus, *mounts, "--pwd", str(Path.cwd()), str(request.container)]
