"""The process groups that DeepSpeed asks for, as the object that it calls `mpu`."""

from __future__ import annotations

from collections.abc import Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from headway.parallel.mesh import PARTS, World

MODEL = ("pipeline", "tensor")
"""Axes along which ranks hold different parts of a model."""


class Ranks:
    """Ranks along replicate x shard x context are one data-parallel group to ZeRO: they reduce gradients together and
    share optimizer state. Those along pipeline x tensor hold the rest of the model.

    Names and signatures are those that DeepSpeed looks for.

    Attributes:
        alone: the group of this rank only.
    """

    def __init__(self, world: World) -> None:
        self.alone = _alone(world)
        self._data, self._model, self._tensor, self._pipeline = (
            fold(world.mesh, axes, self.alone) for axes in (PARTS, MODEL, ("tensor",), ("pipeline",))
        )

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


def fold(mesh: DeviceMesh | None, axes: Sequence[str], alone: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks that differ from this one along some axes of a mesh only; `alone` if there are no others."""
    names = () if mesh is None else tuple(axis for axis in mesh.mesh_dim_names or () if axis in axes)
    names = tuple(axis for axis in names if mesh is not None and mesh[axis].size() > 1)
    if mesh is None or not names:
        return alone
    if len(names) == 1:
        return mesh.get_group(names[0])
    return mesh[names]._flatten("_".join(names)).get_group()


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
