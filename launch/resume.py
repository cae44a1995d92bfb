"""Going on with a run: what may differ between the saved job and the present one."""

from __future__ import annotations

import time
from pathlib import Path

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.recipe import Resolved, leaves

# Settings that a run cannot change on its way, and why. Sources and weights may: the stream says what follows.
FIXED: list[tuple[str, str]] = [
    ("model.attention.kernel", ""),
    ("model.", "the saved weights have the shapes and the meaning of the other value"),
    ("data.tokenizer.", "the saved weights belong to the other vocabulary"),
    ("data.seq_len", "the place in the sample order counts rows of that length"),
    ("data.heldout", "documents would move between training and held-out data"),
    ("data.target_len", "the saved weights and the place in the sample order belong to the other length"),
    ("data.images.size", "the saved weights belong to images of the other size"),
    ("data.images.channels", "the saved weights belong to images of the other kind"),
    ("objective.name", "the saved head belongs to the other objective"),
    ("objective.masking.pairs", "the saved head and the sample order belong to the other objective"),
    ("objective.mae.", "the saved decoder has the other shape"),
    ("optimizer.name", "the saved moments belong to the other optimizer"),
    ("train.seed", "the sample order is a function of the seed"),
]
SILENT = ("run.", "tracking.", "checkpoint.", "parallel.", "data.cache", "data.workers", "train.start_from")
"""Settings whose change needs no word: they do not touch the curve."""


def differences(saved: Job, now: Job) -> list[tuple[str, object, object]]:
    """(setting, saved value, present value) of everything that differs."""
    before, after = dict(leaves(saved)), dict(leaves(now))
    return [(name, before[name], after[name]) for name in after if before[name] != after[name]]


def check_resumable(saved: Job, now: Job) -> list[str]:
    """What differs, a line each, for the settings that touch the curve.

    Raises:
        JobError: a difference with which the saved state has no meaning.
    """
    lines = []
    for name, before, after in differences(saved, now):
        reason = next((why for prefix, why in FIXED if name.startswith(prefix)), "")
        if reason:
            rule = f"this run was begun with {before!r}, and {reason}"
            raise JobError(name, after, rule, f"{before!r}, another run.name, or --fresh")
        if not name.startswith(SILENT):
            lines.append(f"{name}: {before!r} -> {after!r}")
    return lines


CHOSEN = ("precision", "train.compile")
"""Settings whose `auto` is decided once: a run that goes on keeps the decision, and with it its bits. Another engine
decides anew whether to compile."""


def keep_choices(saved: Resolved, now: Resolved) -> Resolved:
    """What `auto` meant when the run was begun, it means again."""
    before, after = dict(leaves(saved.job)), dict(leaves(now.job))
    same = before["parallel.engine"] == after["parallel.engine"]
    for field in CHOSEN:
        if after[field] == "auto" and (same or field != "train.compile"):
            now = now.settle(field, before[field], saved.origins.get(field, "the run's beginning"))
    return now


def set_aside(folder: Path) -> Path | None:
    """Rename an existing run folder so that a new run can take its name; nothing is deleted."""
    if not folder.exists():
        return None
    aside = folder.with_name(f"{folder.name}.before-{time.strftime('%Y%m%d-%H%M%S')}")
    folder.rename(aside)
    return aside
