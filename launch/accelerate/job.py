"""A job, and what Accelerate asks of it: by the variables of `accelerate launch`, by a config file, or by both."""

from __future__ import annotations

import os
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from headway.launch.accelerate.asks import Row, translate
from headway.launch.accelerate.decide import fill_in
from headway.launch.accelerate.environment import read_variables, refuse_lone, replicas
from headway.launch.accelerate.file import UNKNOWN, Processes, check_ranks, load, processes, read_file
from headway.launch.environment import Ranks, find_ranks
from headway.pretrain.device import VISIBLE
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import Resolved, resolve


def resolve_asked(
    recipes: Sequence[str], sets: Sequence[str], file: str | None, ranks: Ranks
) -> tuple[Resolved, list[Row]]:
    """The job of some ranks with what Accelerate asks for, and a row for each key that says what became of it.

    Args:
        file: config file of Accelerate. None is looked for where none is named.

    Raises:
        JobError, InvalidJob: also for conflicts between the job and Accelerate, and for what Headway cannot do.
    """
    resolved = resolve(recipes, sets)
    given = [*read_variables(), *(read_file(file) if file else [])]
    if not given:
        return resolved, []
    return fill_in(resolved, [*translate(given), *replicas(os.environ, ranks)], ranks)


def find_asked_ranks(file: str | None) -> Ranks:
    """Who this process is; raises JobError if Accelerate, or its file, asks for other ranks than there are."""
    ranks = find_ranks()
    refuse_lone(os.environ, ranks)
    if file:
        check_ranks(file, ranks)
    return ranks


def expected_ranks(file: str | None) -> Ranks:
    """Who this process is, or the first of the ranks that a file asks for, where none is started yet."""
    ranks = find_ranks()
    if file is None or ranks.source != Ranks().source:
        return ranks
    return processes(file, 1 if load(file).num_processes == UNKNOWN else None).ranks


def find_processes(file: str | None, nproc: int | None) -> Processes | None:
    """What this process is to start; None if it is one of the ranks. Shows it the GPUs that a file names."""
    if file is None:
        return Processes(nproc) if nproc and nproc > 1 else None
    if find_ranks().source != Ranks().source:
        return None
    found = processes(file, nproc)
    if found.gpus is not None:
        _show_gpus(found.gpus)
    return found if found.ranks.spread else None


def _show_gpus(ids: str) -> None:
    """Raises JobError if a launcher shows this process others."""
    name = VISIBLE[0]
    if (shown := os.environ.setdefault(name, ids)) != ids:
        raise JobError("gpu_ids", ids, f"{name} is {shown!r} here", f"the same, or unset {name}")


def tell(rows: Sequence[Row]) -> list[str]:
    """Lines for people on what Accelerate changed, or would have."""
    lines = [
        f"accelerate: {row.key} = {row.value} -> {row.became}" for row in rows if row.settings or row.stands
    ]
    if quiet := len(rows) - len(lines):
        lines.append(f"accelerate: {quiet} more of its values need no setting (headway config show has them)")
    return lines if rows else []


def tabulate(rows: Sequence[Row]) -> Table:
    """What became of every key."""
    shown = Table(box=None, header_style="bold")
    for title in ("accelerate", "value", "became"):
        shown.add_column(title, no_wrap=title == "accelerate", overflow="fold")
    for row in rows:
        shown.add_row(
            *(Text(each) for each in (row.key, str(row.value), row.became)),
            style=None if row.settings else "dim",
        )
    return shown
