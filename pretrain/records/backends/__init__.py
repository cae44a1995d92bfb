"""Who is told about a run, beside its own files; `base.py` says what each of them is."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

from headway.pretrain.config import Tracking
from headway.pretrain.errors import JobError
from headway.pretrain.records.backends.base import Backend, Told
from headway.pretrain.records.backends.prometheus import PrometheusEndpoint
from headway.pretrain.records.backends.tensorboard import TensorBoardFiles
from headway.pretrain.records.backends.tracker import AccelerateTracker
from headway.pretrain.records.backends.wandb import WandbTracker

OWN: dict[str, tuple[Callable[[Told], Backend], str]] = {
    "tensorboard": (TensorBoardFiles, "tensorboard"),
    "prometheus": (PrometheusEndpoint, "prometheus_client"),
}
"""Headway's own of `tracking.backends`, with the package that each needs. The others are trackers of Accelerate, which
has them under the names of their packages."""


def check_backends(tracking: Tracking) -> None:
    """Raise JobError if a backend of `tracking.backends` needs a package that is not installed, or a tracker that is
    not among them has arguments."""
    for name in tracking.backends:
        package, install = (OWN[name][1], f"'headway[{name}]'") if name in OWN else (name, name)
        if find_spec(package) is None:
            rule = f"needs the package {package}, which is not installed: pip install {install}"
            raise JobError("tracking.backends", name, rule)
    for name, arguments in tracking.trackers.items():
        if name not in tracking.backends or name in OWN:
            trackers = ", ".join(each for each in tracking.backends if each not in OWN) or "none"
            rule = f"must be of a tracker that tracking.backends names (of Accelerate's: {trackers})"
            raise JobError(f"tracking.trackers.{name}", arguments, rule)


def open_backends(told: Told, wandb: str) -> list[Backend]:
    """Those that the job asks for; one that cannot be opened is a warning.

    Args:
        wandb: `online`, `offline` or `off`, from `wandb_mode`.
    Raises:
        JobError: as of `check_backends`.
    """
    opened: list[Backend] = []
    check_backends(told.job.tracking)
    if wandb != "off":
        try:
            tracker = WandbTracker(told, wandb)
        except OSError as error:
            told.warn(f"no W&B: {error}")
        else:
            opened.append(tracker)
    for name in dict.fromkeys(told.job.tracking.backends):
        try:
            opened.append(OWN[name][0](told) if name in OWN else AccelerateTracker(told, name))
        except OSError as error:
            told.warn(f"no {name}: {error}")
    return opened
