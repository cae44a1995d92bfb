"""Settings of the DeepSpeed engine."""

from __future__ import annotations

from typing import Literal

from headway.pretrain.config.base import Section

Offload = Literal["none", "cpu", "nvme"]


class DeepSpeed(Section):
    """What ZeRO shards and where it keeps it; other engines do not read it, so that a recipe may
    hold settings for all of them."""

    zero: Literal["auto", 0, 1, 2, 3] = "auto"
    """Stage of ZeRO: 1 shards optimizer state, 2 gradients too, 3 parameters too. `auto` follows the axes: 3 where
    `parallel.shard` is more than one rank (2 with `parallel.reshard: false`), else 0, or 1 in a narrow precision."""
    offload_optimizer: Offload = "none"
    """Where optimizer state lives and is updated."""
    offload_parameters: Offload = "none"
    """Where parameters live between their uses (stage 3)."""
    nvme_path: str | None = None
    """Folder on a local NVMe disk, for what is offloaded there."""
    config: str | None = None
    """A DeepSpeed JSON file of one's own, merged with what the job gives; what contradicts the job is refused."""
