"""Weights are cut by ZeRO-3 one by one, from host memory: no device ever holds the whole model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from headway.parallel.engines.deepspeed.ranks import Ranks
from headway.parallel.engines.deepspeed.settings import Json

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def partition(package: Any, root: nn.Module, config: Json, ranks: Ranks, device: torch.device) -> None:
    """Cut the parameters below `root`, which are in host memory, and move its buffers to the device.

    Left undone where weights go to disk or are quantized (ZeRO++): DeepSpeed then cuts them itself, from the device.

    Args:
        config: as DeepSpeed is given it.
    """
    zero = config["zero_optimization"]
    offload = zero.get("offload_param", {})
    theirs = offload.get("device") == "nvme" or any(
        key.startswith(("zero_quantized", "zero_hpz")) for key in zero
    )
    if not theirs:
        narrow = next(
            (dtype for key, dtype in DTYPES.items() if config.get(key, {}).get("enabled")), torch.float32
        )
        for parameter in root.parameters():
            parameter.data = parameter.data.to(narrow)
        package.zero.Init(
            module=root,
            data_parallel_group=ranks.get_data_parallel_group(),
            dtype=narrow,
            config_dict_or_path=config,
            remote_device=offload.get("device"),
            pin_memory=offload.get("pin_memory", False),
            mpu=ranks,
        )
    root.to(device)
