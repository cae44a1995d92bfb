"""Which ranks belong together: those that hold the same slice, and the axes along which a group of ranks lies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import product

from torch import Tensor

from headway.parallel.checkpoint.fragments import Fragment
from headway.parallel.mesh import AXES, Layout, World
from headway.pretrain.optim.sharded import is_spread

Place = tuple[int, ...]
"""A rank's number along each of AXES."""


@lru_cache(maxsize=16)
def places(layout: Layout) -> tuple[Place, ...]:
    """Place of every rank, by rank: the last axis runs fastest."""
    return tuple(product(*(range(getattr(layout, axis)) for axis in AXES)))


def varying(layout: Layout, ranks: Iterable[int]) -> tuple[str, ...]:
    """Axes along which these ranks differ: those that a process group of them lies along."""
    chosen = [places(layout)[rank] for rank in ranks]
    return tuple(axis for i, axis in enumerate(AXES) if len({place[i] for place in chosen}) > 1)


def holders(tensor: Tensor | Fragment, world: World) -> frozenset[int]:
    """Ranks that hold the same slice of a tensor as this one.

    A stage of a pipeline owns its tensors; along the other axes a tensor is the same everywhere, but along the
    dims of its mesh that it is cut or summed along.
    """
    if isinstance(tensor, Fragment):
        return tensor.holders or frozenset({world.rank})
    if not is_spread(tensor):
        return alike(world.layout, world.rank, ())
    mesh = tensor.device_mesh
    apart: set[str] = set()
    coordinate = mesh.get_coordinate()
    assert coordinate is not None
    for dim, placement in enumerate(tensor.placements):
        if not placement.is_replicate():
            index = tuple(slice(None) if d == dim else c for d, c in enumerate(coordinate))
            apart |= set(varying(world.layout, mesh.mesh[index].tolist()))
    return alike(world.layout, world.rank, tuple(sorted(apart)))


@lru_cache(maxsize=64)
def alike(layout: Layout, rank: int, apart: Sequence[str]) -> frozenset[int]:
    """Ranks that are at this one's place along the pipeline and along the axes named."""
    fixed = [AXES.index(axis) for axis in {"pipeline", *apart}]
    mine = places(layout)[rank]
    alike = (r for r, place in enumerate(places(layout)) if all(place[i] == mine[i] for i in fixed))
    return frozenset(alike)
