"""The engine that a job names, imported when it is needed: Megatron-Core alone takes seconds."""

from __future__ import annotations

from importlib.util import find_spec

from headway.parallel.engines.base import BaseEngine
from headway.parallel.mesh import World
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.objectives import Objective

PACKAGES = {"deepspeed": ("deepspeed", "deepspeed"), "megatron": ("megatron.core", "megatron")}
"""Engine -> the module that it needs, and the extra that brings it."""


def check_installed(engine: str) -> None:
    """Raise JobError if an engine's package is missing."""
    if engine not in PACKAGES:
        return
    module, extra = PACKAGES[engine]
    if find_spec(module.partition(".")[0]) is None or find_spec(module) is None:
        rule = f"needs {module} (pip install 'headway[{extra}]')"
        raise JobError("parallel.engine", engine, rule, "native")


def build_engine(
    job: Job, objective: Objective, world: World, *, precision: str, compiled: bool
) -> BaseEngine:
    """An engine around an objective that was built on the meta device; collective.

    Raises:
        JobError: the engine's package is missing.
    """
    name = job.parallel.engine
    check_installed(name)
    if name == "deepspeed":
        from headway.parallel.engines.deepspeed.engine import DeepSpeedEngine

        return DeepSpeedEngine(job, objective, world, precision=precision)
    if name == "megatron":
        from headway.parallel.engines.megatron.engine import MegatronEngine

        return MegatronEngine(job, objective, world, precision=precision)
    from headway.parallel.engines.native import NativeEngine

    return NativeEngine(job, objective, world, precision=precision, compiled=compiled)
