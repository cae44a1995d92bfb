"""What a job can ask of an engine, as a table: each feature, and how a job is seen to ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from headway.parallel.mesh import Layout
from headway.pretrain.config import Job


class Asked(NamedTuple):
    """The setting by which a job asks for a feature.

    Attributes:
        field: dotted name.
        value: what the job gives.
        nearest: a value that does not ask for it, if there is one.
    """

    field: str
    value: object
    nearest: object = None


Ask = Callable[[Job, Layout, str], Asked | None]
"""(job, layout, kind of device) -> how the job asks for a feature; None if it does not."""


def _axis(name: str) -> Ask:
    def ask(job: Job, layout: Layout, device: str) -> Asked | None:
        size = getattr(layout, name)
        return Asked(f"parallel.{name}", size, 1) if size > 1 else None

    return ask


def _setting(path: str, *values: object, nearest: object = None) -> Ask:
    """The job has one of some values; any that is not false if none is named."""

    def ask(job: Job, layout: Layout, device: str) -> Asked | None:
        value: Any = job
        for key in path.split("."):
            value = getattr(value, key)
        found = value in values if values else bool(value)
        return Asked(path, value, nearest) if found else None

    return ask


def _context(method: str) -> Ask:
    def ask(job: Job, layout: Layout, device: str) -> Asked | None:
        other = "ulysses" if method == "ring" else "ring"
        asked = layout.context > 1 and job.parallel.context_method == method
        return Asked("parallel.context_method", method, other) if asked else None

    return ask


def _schedule(name: str) -> Ask:
    def ask(job: Job, layout: Layout, device: str) -> Asked | None:
        asked = layout.pipeline > 1 and job.parallel.schedule == name
        return Asked("parallel.schedule", name, None if name == "1f1b" else "1f1b") if asked else None

    return ask


def _precision(name: str, on: str) -> Ask:
    def ask(job: Job, layout: Layout, device: str) -> Asked | None:
        return Asked("precision", name, "auto") if job.precision == name and device == on else None

    return ask


def _sequence(job: Job, layout: Layout, device: str) -> Asked | None:
    asked = layout.tensor > 1 and job.parallel.sequence
    return Asked("parallel.sequence", True, False) if asked else None


def _experts(job: Job, layout: Layout, device: str) -> Asked | None:
    count = job.model.experts.count
    return Asked("model.experts.count", count, 0) if count else None


def _hybrid(job: Job, layout: Layout, device: str) -> Asked | None:
    asked = layout.replicate > 1 and layout.shard > 1
    return Asked("parallel.replicate", layout.replicate, 1) if asked else None


def _whole_matrices(*, cut: bool) -> Ask:
    """Of an optimizer that looks at whole matrices: whether what it moves is cut over ranks."""

    def ask(job: Job, layout: Layout, device: str) -> Asked | None:
        name = job.optimizer.name
        if name == "adamw" or cut != _cuts(job, layout):
            return None
        return Asked("optimizer.name", name, "adamw")

    return ask


def _cuts(job: Job, layout: Layout) -> bool:
    """Whether parameters or their state are cut over ranks."""
    zero, sharded = job.parallel.deepspeed.zero, job.parallel.megatron.distributed_optimizer
    axes = layout.shard * layout.tensor * layout.expert > 1
    more = {"deepspeed": zero not in ("auto", 0), "megatron": sharded is True}
    return axes or more.get(job.parallel.engine, False)


def _distillation(job: Job, layout: Layout, device: str) -> Asked | None:
    return Asked("objective.distill.enabled", True, False) if job.objective.distill.on else None


def _average_beside_disk(job: Job, layout: Layout, device: str) -> Asked | None:
    asked = bool(job.optimizer.ema) and job.parallel.deepspeed.offload_optimizer == "nvme"
    return Asked("parallel.deepspeed.offload_optimizer", "nvme", "cpu") if asked else None


FEATURES: dict[str, Ask] = {
    "experts": _experts,
    "replicate": _axis("replicate"),
    "shard": _axis("shard"),
    "replicate x shard": _hybrid,
    "tensor": _axis("tensor"),
    "sequence": _sequence,
    "context by ring": _context("ring"),
    "context by ulysses": _context("ulysses"),
    "expert": _axis("expert"),
    "pipeline": _axis("pipeline"),
    **{f"schedule {name}": _schedule(name) for name in
       ("gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")},
    "fp32": _setting("precision", "fp32", nearest="auto"),
    "bf16": _setting("precision", "bf16", nearest="auto"),
    "fp16 on cpu": _precision("fp16", "cpu"),
    "fp16 on cuda": _precision("fp16", "cuda"),
    "fp64": _setting("precision", "fp64", nearest="fp32"),
    "fp8 on cpu": _precision("fp8", "cpu"),
    "fp8 on cuda": _precision("fp8", "cuda"),
    "adamw": _setting("optimizer.name", "adamw"),
    "muon, lamb, adafactor of whole state": _whole_matrices(cut=False),
    "muon, lamb, adafactor of state that is cut": _whole_matrices(cut=True),
    "ema": _setting("optimizer.ema", nearest=0.0),
    "layer decay": lambda job, layout, device: (
        Asked("optimizer.layer_decay", job.optimizer.layer_decay, 1.0) if job.optimizer.layer_decay != 1 else None
    ),
    "compile": _setting("train.compile", True, nearest=False),
    "recompute": _setting("parallel.recompute", "full", "attention", "products", "budget", nearest="none"),
    "offload of activations": _setting("parallel.offload", nearest=False),
    "lsuv": _setting("model.init.lsuv", nearest=False),
    "spectral": _setting("model.spectral", nearest=False),
    "distillation": _distillation,
    "histograms": _setting("tracking.histograms_every", nearest=0),
    "check of replicas": _setting("parallel.check_every", nearest=0),
    "offload of optimizer state to cpu": _setting("parallel.deepspeed.offload_optimizer", "cpu", nearest="none"),
    "offload of optimizer state to nvme": _setting("parallel.deepspeed.offload_optimizer", "nvme", nearest="cpu"),
    "offload of optimizer state to nvme x ema": _average_beside_disk,
    "offload of parameters to cpu": _setting("parallel.deepspeed.offload_parameters", "cpu", nearest="none"),
    "offload of parameters to nvme": _setting("parallel.deepspeed.offload_parameters", "nvme", nearest="cpu"),
}  # fmt: skip
"""In the order in which they are told."""

DEEPSPEED_ONLY = frozenset(name for name in FEATURES if name.startswith("offload of") and "activ" not in name)
"""Asked for in a section that other engines do not read."""
