"""A DeepSpeed JSON of one's own, merged with what a job says: keys that the job does not speak of pass through, `auto`
is filled in as Hugging Face's Trainer fills it, and what contradicts the job is an error that names both."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from headway.parallel.engines.deepspeed.settings import Json, generate
from headway.parallel.mesh import Layout
from headway.pretrain.config import Job
from headway.pretrain.errors import JobError

FIELD = "parallel.deepspeed.config"

ONE_BIT = ("onebitadam", "zerooneadam", "onebitlamb")
"""Optimizers that send one bit of each momentum (Tang et al. 2021; Lu et al. 2022; Li et al. 2021)."""

QUANTIZED = ("zero_quantized_weights", "zero_quantized_gradients", "zero_quantized_nontrainable_weights")
"""Of ZeRO++ (Wang et al. 2023), what quantizes."""

KNOWN = frozenset(
    [
        "activation_checkpointing",
        "aio",
        "autotuning",
        "bf16",
        "bfloat16",
        "checkpoint",
        "comms_logger",
        "communication_data_type",
        "compile",
        "compression_training",
        "csv_monitor",
        "data_efficiency",
        "data_types",
        "disable_allgather",
        "disable_python_gc",
        "dump_state",
        "flops_profiler",
        "fp16",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "gradient_predivide_factor",
        "memory_breakdown",
        "optimizer",
        "prescale_gradients",
        "scheduler",
        "seq_parallel_communication_data_type",
        "sparse_gradients",
        "steps_per_print",
        "tensorboard",
        "timers",
        "torch_autocast",
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "use_node_local_storage",
        "wall_clock_breakdown",
        "wandb",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    ]
)
"""Top-level keys that make sense here. DeepSpeed takes no notice of those that it does not know."""


class Owner(NamedTuple):
    """The setting of a job that has the say over a key.

    Attributes:
        field: dotted name.
        value: of the key, by the job.
    """

    field: str
    value: Callable[[Job], Any]


OWNERS: dict[str, Owner] = {
    "gradient_clipping": Owner("optimizer.clip", lambda j: j.optimizer.clip or 0.0),
    "optimizer.params.lr": Owner("optimizer.lr", lambda j: j.optimizer.lr),
    "optimizer.params.betas": Owner("optimizer.betas", lambda j: list(j.optimizer.betas)),
    "optimizer.params.eps": Owner("optimizer.eps", lambda j: j.optimizer.eps),
    "optimizer.params.weight_decay": Owner("optimizer.weight_decay", lambda j: j.optimizer.weight_decay),
    "train_batch_size": Owner("train.global_batch", lambda j: j.train.global_batch),
}

FROM_GENERATED = {
    "train_micro_batch_size_per_gpu": "parallel.micro_batch",
    "gradient_accumulation_steps": "train.global_batch, parallel.micro_batch and the number of ranks",
    "zero_optimization.stage": "parallel.deepspeed.zero",
    "zero_optimization.offload_optimizer.device": "parallel.deepspeed.offload_optimizer",
    "zero_optimization.offload_optimizer.nvme_path": "parallel.deepspeed.nvme_path",
    "zero_optimization.offload_param.device": "parallel.deepspeed.offload_parameters",
    "zero_optimization.offload_param.nvme_path": "parallel.deepspeed.nvme_path",
    "zero_allow_untested_optimizer": "the engine, whose optimizer it is",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
}
"""Keys whose value is the generated one, and the setting that it comes from."""

UNLESS_GIVEN = {
    "zero_optimization.offload_optimizer.device": "none",
    "zero_optimization.offload_param.device": "none",
    "bf16.enabled": False,
    "fp16.enabled": False,
}
"""What it means that the generated JSON has not got a key."""

WIDTHS: dict[str, Callable[[int], int]] = {
    "zero_optimization.reduce_bucket_size": lambda e: e * e,
    "zero_optimization.stage3_prefetch_bucket_size": lambda e: int(0.9 * e * e),
    "zero_optimization.stage3_param_persistence_threshold": lambda e: 10 * e,
}
"""What `auto` is for these keys at hidden size e, as in Hugging Face's Trainer."""


def configure(job: Job, layout: Layout, precision: str, device: str) -> Json:
    """The whole JSON: what the job says, and what its own file adds.

    Raises:
        JobError: the file cannot be read, contradicts the job, or asks for what the device has not.
    """
    ours = generate(job, layout, precision)
    given = job.parallel.deepspeed.config
    if given is None:
        return ours
    theirs = read(given)
    check(theirs, device)
    return _merged(ours, _settled(theirs, ours, job))


def read(given: str) -> Json:
    """The JSON in a file, or written out in the setting itself.

    Raises:
        JobError: there is no such file, or it is no JSON object.
    """
    try:
        text = given if given.lstrip().startswith("{") else Path(given).read_text()
        found = json.loads(text)
    except OSError as error:
        raise JobError(FIELD, given, f"cannot be read: {error.strerror}") from error
    except json.JSONDecodeError as error:
        rule = f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise JobError(FIELD, given, rule) from error
    if not isinstance(found, dict):
        raise JobError(FIELD, given, "a DeepSpeed configuration is a JSON object")
    return found


def check(theirs: Json, device: str) -> None:
    """Raise JobError for keys that there are not, that another part of a job has, or that the device has not."""
    for key in theirs:
        if key not in KNOWN:
            raise JobError(
                f"{FIELD}: {key}", theirs[key], "is none of DeepSpeed's keys that a job here can have"
            )
    if "scheduler" in theirs:
        rule = "contradicts schedule.name: the job's schedule sets the learning rate of every step"
        raise JobError(
            f"{FIELD}: scheduler", theirs["scheduler"], rule, "leave the section out, and set schedule"
        )
    if theirs.get("torch_autocast", {}).get("enabled"):
        rule = "contradicts precision, which says what is computed in which precision"
        raise JobError(f"{FIELD}: torch_autocast.enabled", True, rule, "leave it out, and set precision")
    if device == "cuda":
        return
    zero = theirs.get("zero_optimization", {})
    for key in (key for key in QUANTIZED if zero.get(key)):
        rule = f"ZeRO++ quantizes by kernels for GPUs, which {device} has not"
        raise JobError(f"{FIELD}: zero_optimization.{key}", zero[key], rule, False)
    if zero.get("zero_hpz_partition_size", 1) not in (1, "auto"):
        rule = f"ZeRO++ keeps a second copy on the GPUs of a host; {device} has none"
        name = f"{FIELD}: zero_optimization.zero_hpz_partition_size"
        raise JobError(name, zero["zero_hpz_partition_size"], rule, 1)
    if (kind := str(theirs.get("optimizer", {}).get("type", ""))).lower() in ONE_BIT:
        rule = f"1-bit optimizers compress by kernels for GPUs, which {device} has not"
        raise JobError(f"{FIELD}: optimizer.type", kind, rule, "AdamW")


def one_bit(config: Json) -> bool:
    """Whether DeepSpeed is to build one of its 1-bit optimizers in place of ours."""
    return str(config.get("optimizer", {}).get("type", "")).lower() in ONE_BIT


def _settled(theirs: Json, ours: Json, job: Job) -> Json:
    """Their JSON with `auto` filled in, if it does not contradict ours."""
    settled: Json = {}
    for path, value in _leaves(theirs):
        owner, right = _right(path, ours, job)
        if value == "auto":
            if owner is None:
                rule = "nothing in the job says what that is"
                raise JobError(f"{FIELD}: {path}", value, rule, "a number")
            value = right
        elif owner is not None and not path.startswith(tuple(WIDTHS)) and not _same(path, value, right):
            raise JobError(f"{FIELD}: {path}", value, f"contradicts {owner}, which makes it {right!r}", right)
        _put(settled, path, value)
    return settled


def _right(path: str, ours: Json, job: Job) -> tuple[str | None, Any]:
    """Who has the say over a key, and its value; nobody for keys that the job does not speak of."""
    if path in OWNERS:
        return OWNERS[path].field, OWNERS[path].value(job)
    if path == "optimizer.type":
        return "optimizer.name", "AdamW"
    if path in WIDTHS:
        return "model.hidden", WIDTHS[path](job.model.hidden)
    if path in FROM_GENERATED:
        return FROM_GENERATED[path], _get(ours, path, UNLESS_GIVEN.get(path))
    found = _get(ours, path, None)
    return ("the engine's own choice", found) if found is not None else (None, None)


def _same(path: str, theirs: Any, right: Any) -> bool:
    if path == "optimizer.type":
        return str(theirs).lower() in ("adamw", *ONE_BIT)
    if path not in OWNERS and path not in FROM_GENERATED:
        return True  # a choice of ours, which they may make differently
    if isinstance(right, int | float) and not isinstance(right, bool) and isinstance(theirs, int | float):
        return float(theirs) == float(right)
    return bool(theirs == right)


def _leaves(tree: Json, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted path; lists are values, and so are empty sections."""
    for key, value in tree.items():
        path = f"{prefix}.{key}" if prefix else key
        if isinstance(value, dict) and value:
            yield from _leaves(value, path)
        else:
            yield path, value


def _get(tree: Json, path: str, default: Any) -> Any:
    here: Any = tree
    for key in path.split("."):
        if not isinstance(here, dict) or key not in here:
            return default
        here = here[key]
    return here


def _put(tree: Json, path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        tree = tree.setdefault(key, {})
    tree[last] = value


def _merged(ours: Json, theirs: Json) -> Json:
    """Ours with theirs over it, section by section."""
    both = {
        key: _merged(ours[key], value)
        for key, value in theirs.items()
        if isinstance(value, dict) and isinstance(ours.get(key), dict)
    }
    return ours | theirs | both
