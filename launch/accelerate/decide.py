"""Who decides where a job and Accelerate both speak.

What the job does not say is filled in. Where a recipe says otherwise, it is an error that names both; the command line
decides. Defaults of `accelerate launch` yield to all others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from headway.launch.accelerate.asks import ORIGIN, Row, raise_all
from headway.launch.accelerate.rules import LEFT, Host, Settings, Share
from headway.launch.environment import Ranks
from headway.parallel import mesh
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import Resolved, leaves, one_line

MICRO_BATCH = "parallel.micro_batch"


def fill_in(resolved: Resolved, rows: Sequence[Row], ranks: Ranks) -> tuple[Resolved, list[Row]]:
    """The job with what Accelerate asks for, and the rows with what became of them.

    Raises:
        JobError, InvalidJob: conflicts, all at once; or accumulation that the global batch does not allow.
    """
    told: dict[int, Row] = {}
    numbered = sorted(enumerate(rows), key=lambda pair: not pair[1].asked)
    for last in (False, True):  # micro-batches depend on the layout
        errors = []
        for index, row in numbered:
            if last != any(isinstance(value, Share) for value in row.settings.values()):
                continue
            try:
                told[index], new = _decide(resolved, _known(row, resolved.job, ranks), ranks)
            except JobError as error:
                errors.append(error)
            else:
                resolved = resolved.settle_all(new, ORIGIN + row.key) if new else resolved
        raise_all(errors)
    return resolved, [told[index] for index in range(len(rows))]


def _decide(resolved: Resolved, row: Row, ranks: Ranks) -> tuple[Row, Settings]:
    """What became of a row, and the settings that are new by it; raises JobError for a conflict."""
    said, new, stand = dict(leaves(resolved.job)), dict[str, Any](), dict[str, str]()
    for name, value in row.settings.items():
        by = resolved.origins.get(name)
        if by is None or (said[name] == LEFT != value and agree(name, value, LEFT)):
            new[name] = value
        elif not agree(name, value, said[name]) and not _same_rows(resolved.job, name, value, ranks):
            stand[name] = f"{name} = {one_line(said[name])} ({by}) stands"
            if not row.asked:
                return replace(row, settings={}, stands=stand[name]), {}
            if not resolved.set_by_hand(name):
                rule = f"asks for {name} = {one_line(value)}, and {by} for {one_line(said[name])}"
                raise JobError(ORIGIN + row.key, row.value, rule, f"the same, or decide by --set {name}=...")
    made = {name: new.get(name, said.get(name)) for name in row.settings if name not in stand}
    return replace(row, settings=made, stands="; ".join(stand.values())), new


def agree(name: str, asked: Any, said: Any) -> bool:
    """Whether two values of a setting can both hold: an axis that takes what others leave may have any size, but a size
    of 1 is never meant by it."""
    if name.startswith("parallel.") and LEFT in (asked, said):
        return asked in (LEFT, said) or asked > 1
    return bool(asked == said)


def _same_rows(job: Job, name: str, asked: Any, ranks: Ranks) -> bool:
    """Whether micro-batches have as many rows, where all of a rank's rows at once is said by no number."""
    if name != MICRO_BATCH:
        return False
    whole = _rows(job, ranks)
    return (asked or whole) == (job.parallel.micro_batch or whole)


def _known(row: Row, job: Job, ranks: Ranks) -> Row:
    """The row with numbers where its settings depend on the number of ranks."""
    known = {}
    for name, value in row.settings.items():
        if isinstance(value, Share):
            value = _micro_batch(row, job, value, ranks)
        known[name] = ranks.local_world if isinstance(value, Host) else value
    return replace(row, settings=known)


def _micro_batch(row: Row, job: Job, share: Share, ranks: Ranks) -> int | None:
    """Rows of a micro-batch if a rank's rows are cut into so many; None for all at once."""
    rows = _rows(job, ranks)
    if rows % share.parts:
        legal = [d for d in range(1, rows + 1) if rows % d == 0]
        rule = f"micro-batches must divide the {rows} rows of a rank (train.global_batch {job.train.global_batch})"
        raise JobError(ORIGIN + row.key, row.value, rule, min(legal, key=lambda d: abs(d - share.parts)))
    return rows // share.parts if share.parts > 1 else None


def _rows(job: Job, ranks: Ranks) -> int:
    """Rows of a global batch on a rank."""
    return job.train.global_batch // mesh.lay_out(job.parallel, mesh.students(job, ranks.world)).data
