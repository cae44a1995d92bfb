"""Which parts of the whole tensors this rank holds, read off plain tensors and DTensors."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from headway.parallel.checkpoint.boxes import Box
from headway.parallel.checkpoint.fragments import Fragment
from headway.pretrain.errors import CheckpointError
from headway.pretrain.tensor_files import DTYPES

Runs = list[tuple[int, int]]
"""Ranges (start, stop) of one dim's global indices, in the order in which a local shard holds them."""


@dataclass(frozen=True)
class Held:
    """A part of a tensor on this rank: a box of the whole, and a view of the live values in it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    box: Box
    view: Tensor

    @property
    def what(self) -> tuple[str, str, Box]:
        """What identifies the part: equal on two ranks only if they hold the same values."""
        return self.name, self.dtype, self.box

    @property
    def nbytes(self) -> int:
        return self.view.nbytes


def held(tensors: Mapping[str, Any]) -> list[Held]:
    """All parts that this rank holds, by name; parts without elements are left out.

    A plain tensor is a whole. A `Fragment` knows its boxes. A DTensor is one box under `Shard` and `Replicate` in any
    order and any number of axes on one dim, and several boxes where FSDP2 over tensor parallelism interleaves
    (`_StridedShard`).

    Raises:
        CheckpointError: for a dtype that safetensors lacks, a pending reduction, or an unknown placement.
    """
    parts: list[Held] = []
    for name, tensor in tensors.items():
        dtype, shape = str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        if dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name}: a checkpoint cannot hold {dtype}; it holds {', '.join(DTYPES)}."
            )
        parts += [Held(name, dtype, shape, box, view) for box, view in _boxes(name, tensor) if box.numel]
    return parts


def _boxes(name: str, tensor: Tensor | Fragment) -> list[tuple[Box, Tensor]]:
    if isinstance(tensor, Fragment):
        return list(tensor.boxes())
    if isinstance(tensor, DTensor):
        return _cut(name, tensor)
    return [(Box.whole(tensor.shape), tensor.detach())]


def _cut(name: str, tensor: DTensor) -> list[tuple[Box, Tensor]]:
    with torch.no_grad():
        local = tensor.to_local().detach()
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:  # this rank is outside the tensor's mesh
        return []
    runs: list[Runs] = [[(0, n)] for n in tensor.shape]
    for axis, placement in _in_order(name, tensor):
        dim, parts = placement.dim, tensor.device_mesh.size(axis)
        runs[dim] = _shard(runs[dim], placement, parts, coordinate[axis])
    if (expected := tuple(map(_length, runs))) != tuple(local.shape):
        found = list(local.shape)
        raise CheckpointError(
            f"tensor {name}: local shape {found}, but its placements give {list(expected)}."
        )
    if not local.numel():
        return []
    sides = [_placed(dim) for dim in runs]
    cut = []
    for corner in itertools.product(*sides):
        box = Box(tuple(c[0] for c in corner), tuple(c[1] for c in corner))
        cut.append((box, local[tuple(slice(at, at + n) for _, n, at in corner)]))
    return cut


def _in_order(name: str, tensor: DTensor) -> list[tuple[int, Shard | _StridedShard]]:
    """Axes that cut the tensor, with their placements, in the order in which they cut it.

    From left to right; but FSDP2 over tensor parallelism says by `_StridedShard` that axes to its right, as many parts
    as its factor, have cut before it. Each of those parts is then a run of its own, cut as it is, short ones too.
    """
    cutting: list[tuple[int, Any]] = []
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard | _StridedShard):
            cutting.append((axis, placement))
        elif not isinstance(placement, Replicate):
            raise CheckpointError(f"tensor {name}: placement {placement} cannot be saved or loaded.")
    first, later = [], []
    for i, (axis, placement) in enumerate(cutting):
        right = [other for other, p in cutting[i + 1 :] if p.dim == placement.dim]
        parts = math.prod(map(tensor.device_mesh.size, right))
        if right and isinstance(placement, _StridedShard) and int(placement.split_factor) == parts:
            later.append((axis, Shard(placement.dim)))
        else:
            first.append((axis, placement))
    return first + later[::-1]


def _shard(runs: Runs, placement: Placement, parts: int, index: int) -> Runs:
    """The share of rank `index` of `parts` in a dim that earlier axes have left at `runs`."""
    if not isinstance(placement, _StridedShard):
        return _take(runs, *_chunk(_length(runs), parts, index))
    # No axis is left that has made the `factor` blocks; this rank has its share of each block.
    factor, share = int(placement.split_factor), []
    for block in range(factor):
        inner = _take(runs, *_chunk(_length(runs), factor, block))
        share += _take(inner, *_chunk(_length(inner), parts, index))
    return _joined(share)


def _chunk(size: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of chunk `index`, as torch.chunk cuts: equal chunks, the last ones short or empty."""
    step = -(-size // parts)
    return min(size, step * index), min(size, step * (index + 1))


def _take(runs: Runs, start: int, stop: int) -> Runs:
    """Positions start..stop of the indices that `runs` lists."""
    taken, at = [], 0
    for a, b in runs:
        low, high = max(start - at, 0), min(stop - at, b - a)
        if low < high:
            taken.append((a + low, a + high))
        at += b - a
    return taken


def _joined(runs: Runs) -> Runs:
    joined: Runs = []
    for a, b in runs:
        if joined and joined[-1][1] == a:
            joined[-1] = (joined[-1][0], b)
        else:
            joined.append((a, b))
    return joined


def _placed(runs: Runs) -> list[tuple[int, int, int]]:
    """Each run as (start in the whole, length, start in the local shard)."""
    lengths = [b - a for a, b in runs]
    starts = itertools.accumulate(lengths[:-1], initial=0)
    return [(a, n, at) for (a, _), n, at in zip(runs, lengths, starts, strict=True)]


def _length(runs: Runs) -> int:
    return sum(b - a for a, b in runs)
