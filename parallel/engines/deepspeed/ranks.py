"""The process groups that DeepSpeed asks for, as the object that it calls `mpu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist

from headway.parallel.mesh import PARTS, World

MODEL = ("pipeline", "tensor")
"""Axes along which ranks hold different parts of a model."""


class Ranks:
    """Ranks along replicate x shard x context are one data-parallel group to ZeRO: they reduce gradients together and
    share optimizer state. Those along pipeline x tensor hold the rest of the model.

    Names and signatures are those that DeepSpeed looks for.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        alone = _alone(world)
        self._data, self._model = _fold(world, PARTS, alone), _fold(world, MODEL, alone)
        self._tensor = _fold(world, ("tensor",), alone)
        self._pipeline = _fold(world, ("pipeline",), alone)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._data

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self._data)

    def get_data_parallel_world_size(self) -> int:
        return self._data.size()

    def get_data_parallel_rank(self) -> int:
        return self._data.rank()

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._model

    def get_model_parallel_world_size(self) -> int:
        return self._model.size()

    def get_model_parallel_rank(self) -> int:
        return self._model.rank()

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self._tensor

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._tensor.size()

    def get_tensor_model_parallel_rank(self) -> int:
        return self._tensor.rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        return self._pipeline

    def get_pipeline_model_parallel_world_size(self) -> int:
        return self._pipeline.size()


def _fold(world: World, axes: Sequence[str], alone: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks that differ from this one along some axes only."""
    if world.mesh is None:
        return alone
    names = tuple(axis for axis in axes if getattr(world.layout, axis) > 1)
    if len(names) < 2:
        return world.group(names[0]) if names else alone
    return world.mesh[names]._flatten("_".join(names)).get_group()


def _alone(world: World) -> dist.ProcessGroup:
    """A group of this rank only."""
    if world.mesh is None:
        group = dist.group.WORLD
        assert group is not None
        return group
    if world.layout.shard == 1:
        return world.group("shard")  # the one axis of a mesh that may have one rank
    found: dist.ProcessGroup = dist.new_subgroups(1)[0]
    return found
