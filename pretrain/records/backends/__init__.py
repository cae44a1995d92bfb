"""Who is told about a run, beside its own files; `base.py` says what each of them is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec

from headway.pretrain.errors import JobError
from headway.pretrain.records.backends.base import Backend, Told
from headway.pretrain.records.backends.prometheus import PrometheusEndpoint
from headway.pretrain.records.backends.tensorboard import TensorBoardFiles
from headway.pretrain.records.backends.wandb import WandbTracker

OPTIONAL: dict[str, tuple[Callable[[Told], Backend], str]] = {
    "tensorboard": (TensorBoardFiles, "tensorboard"),
    "prometheus": (PrometheusEndpoint, "prometheus_client"),
}
"""Those of `tracking.backends`, with the package that each needs."""


def check_backends(names: Sequence[str]) -> None:
    """Raise JobError if a backend of `tracking.backends` needs a package that is not installed."""
    for name in names:
        if find_spec(OPTIONAL[name][1]) is None:
            rule = f"needs the package {OPTIONAL[name][1]}, which is not installed: pip install 'headway[{name}]'"
            raise JobError("tracking.backends", name, rule)


def open_backends(told: Told, wandb: str) -> list[Backend]:
    """Those that the job asks for; one that cannot be opened is a warning.

    Args:
        wandb: `online`, `offline` or `off`, from `wandb_mode`.
    Raises:
        JobError: one needs a package that is not installed.
    """
    opened: list[Backend] = []
    check_backends(told.job.tracking.backends)
    if wandb != "off":
        try:
            tracker = WandbTracker(told, wandb)
        except OSError as error:
            told.warn(f"no W&B: {error}")
        else:
            opened.append(tracker)
    for name in dict.fromkeys(told.job.tracking.backends):
        try:
            opened.append(OPTIONAL[name][0](told))
        except OSError as error:
            told.warn(f"no {name}: {error}")
    return opened
