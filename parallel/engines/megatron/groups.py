"""Megatron-Core's process groups, made from our layout on the ranks that are already connected.

Megatron counts ranks from the inside, "tp-cp-ep-dp-pp"; our axes, from the outside: pipeline, replicate, shard,
context, tensor. That is the same order, and replicate x shard is Megatron's data parallelism. Experts lie on
neighbouring ranks in both, over shard x context x tensor, each rank with whole experts (Megatron's expert tensor
parallelism is 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from headway.parallel.mesh import World

ORDER = "tp-cp-ep-dp-pp"

_made: dict[str, Any] = {}
"""Groups of this process: those of the last layout. Megatron keeps them in globals of a module, one set at a time."""


@dataclass(frozen=True)
class Places:
    """Where a rank stands, as Megatron counts."""

    tp: int
    cp: int
    dp: int
    pp: int


def start(world: World, timeout: float) -> ProcessGroupCollection:
    """The groups of a layout; collective. Those of another layout before are forgotten.

    A process alone gets a group of its own, without which Megatron does nothing.

    Stages of a pipeline that share parameters add their gradients themselves (`pipeline.shared`): Megatron's group for
    that is given one rank.

    Args:
        world: this process among the ranks.
        timeout: seconds that a collective may take.
    """
    if not dist.is_initialized():
        dist.init_process_group(world.backend, store=dist.HashStore(), rank=0, world_size=1)
    key = world.layout, dist.group.WORLD
    if _made.get("key") == key and parallel_state.is_initialized():
        return _made["groups"]
    stop()
    layout = world.layout
    parallel_state.initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout / 60,
        order=ORDER,
        get_embedding_ranks=lambda line, *_: line[:1],
        create_gloo_process_groups=False,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    _agree(world, groups)
    _made.update(key=key, groups=groups)
    return groups


def stop() -> None:
    """Forget the groups, so that those of another layout can be made. They end with the process' own group."""
    _made.clear()
    parallel_state.destroy_model_parallel()


def _agree(world: World, groups: ProcessGroupCollection) -> None:
    """Assert that Megatron has put this rank where we have."""
    ours = places(world)
    theirs = Places(groups.tp.rank(), groups.cp.rank(), groups.dp.rank(), groups.pp.rank())
    assert ours == theirs, f"rank {world.rank}: ours {ours}, Megatron's {theirs}"
    assert groups.dp_cp.rank() == ours.dp * world.layout.context + ours.cp
    if world.experts is not None:
        assert groups.ep.rank() == world.experts.get_local_rank("expert")


def places(world: World) -> Places:
    """Where this rank stands."""
    return Places(world.place("tensor"), world.place("context"), world.data_rank, world.place("pipeline"))
