"""DeepSpeed as a library among others: imported late, told of our process group, quiet."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from headway.parallel.engines.deepspeed.ranks import Ranks
from headway.parallel.mesh import World
from headway.pretrain.errors import JobError

DEPRECATED = r"`torch\.distributed\.\w+` is deprecated"
"""What torch 2.13 says of collectives that DeepSpeed 0.19 calls at every turn."""


def load(device_type: str) -> Any:
    """The package, ready for a kind of device.

    Raises:
        JobError: it is not installed.
    """
    # Before the first import: DeepSpeed takes the GPUs that it finds, and a job may leave them alone.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    try:
        import deepspeed
        from deepspeed.ops import __compatible_ops__
    except ImportError as error:
        rule = f"a package is missing ({error}): pip install 'headway[deepspeed]'"
        raise JobError("parallel.engine", "deepspeed", rule, "native") from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", DEPRECATED, FutureWarning)
    # An all-reduce of inference through shared memory, which a minute of compiling would go before.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def join(package: Any, world: World) -> None:
    """Let DeepSpeed use our process group, and forget what it knows of one before.

    One process without a group gets one: DeepSpeed knows no other way.
    """
    from deepspeed.runtime.zero import parameter_offload, partition_parameters
    from deepspeed.utils import groups

    if not dist.is_initialized():
        dist.init_process_group(world.backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ["LOCAL_RANK"] = str(world.local_rank)  # from here it takes its device
    package.init_distributed(dist_init_required=False, verbose=False)
    groups._release_process_group_references()
    parameter_offload.FWD_MODULE_STACK.clear()
    # It numbers parameters and modules for as long as the process lives; ranks that had other engines before would
    # disagree.
    partition_parameters.Init.param_id = 0
    (numbers,) = parameter_offload.DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__
    numbers[:] = [0]


def initialise(
    package: Any,
    module: nn.Module,
    optimizer: Optimizer | None,
    groups: Any,
    config: dict[str, Any],
    ranks: Ranks,
) -> Any:
    """DeepSpeed's engine around a module, with our optimizer; with one of its own over `groups` if there is none."""
    with contextlib.redirect_stdout(io.StringIO()):  # its memory reports
        engine, *_ = package.initialize(
            model=module,
            optimizer=optimizer,
            model_parameters=None if optimizer else groups,
            config=config,
            mpu=ranks,
            dist_init_required=False,
        )
    return engine


def has_async_io() -> bool:
    """Whether files are read and written beside the computation, without which nothing is kept on NVMe."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    with contextlib.redirect_stdout(io.StringIO()):
        return bool(AsyncIOBuilder().is_compatible(verbose=False))
