"""Settings of the Megatron-Core engine."""

from __future__ import annotations

from typing import Literal

from headway.pretrain.config.base import Section


class Megatron(Section):
    """How Megatron-Core reduces gradients and shards optimizer state; other engines do not read it, so that a recipe
    may hold settings for all of them."""

    distributed_optimizer: bool | Literal["auto"] = "auto"
    """Shard optimizer state over the data ranks (replicate x shard x context), as ZeRO's first stage does; `auto` does
    so where the optimizer can, which is AdamW."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward goes on."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward goes on; needs `overlap_grad_reduce`."""
