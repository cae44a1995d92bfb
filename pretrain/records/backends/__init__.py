"""Who is told about a run, beside its own files; `base.py` says what each of them is."""

from __future__ import annotations

from headway.pretrain.records.backends.base import Backend, Told
from headway.pretrain.records.backends.wandb import WandbTracker


def open_backends(told: Told, wandb: str) -> list[Backend]:
    """Those that the job asks for; one that cannot be opened is a warning.

    Args:
        wandb: `online`, `offline` or `off`, from `wandb_mode`.
    """
    opened: list[Backend] = []
    if wandb != "off":
        try:
            tracker = WandbTracker(told, wandb)
        except OSError as error:
            told.warn(f"no W&B: {error}")
        else:
            opened.append(tracker)
    return opened
