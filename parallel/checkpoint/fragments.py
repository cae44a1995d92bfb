"""Fragments: runs of elements of a tensor's part, as optimizers that shard flat buffers hold them (ZeRO, Rajbhandari et
al. 2020; Megatron-Core's distributed optimizer)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.parallel.checkpoint.boxes import Box


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + len(run)) of the flattened part of a whole tensor.

    Attributes:
        run: the live values, 1-D and contiguous; may be empty.
        shape: of the whole.
        offset: where the part begins in the whole, one number a dim.
        part: shape of the part.
        start: where the run begins in the flattened part.
        holders: global ranks that hold the same run; None if that is not known.
    """

    run: Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    part: tuple[int, ...]
    start: int = 0
    holders: frozenset[int] | None = None

    def __post_init__(self) -> None:
        assert self.run.dim() == 1, "a run is flat"
        assert self.run.is_contiguous(), "a run is contiguous"
        assert self.start + len(self.run) <= math.prod(self.part), "a run lies in its part"

    @property
    def dtype(self) -> torch.dtype:
        return self.run.dtype

    def numel(self) -> int:
        """Elements of the whole."""
        return math.prod(self.shape)

    def boxes(self) -> Iterator[tuple[Box, Tensor]]:
        """The run as boxes of the whole, each with a view of its values: of a matrix the end of a row, whole rows and
        the beginning of one."""
        at = 0
        for corner, sides in _blocks(self.part, self.start, self.start + len(self.run)):
            count = math.prod(sides)
            place = tuple(o + c for o, c in zip(self.offset, corner, strict=True))
            yield Box(place, sides), self.run[at : at + count].view(sides)
            at += count


def _blocks(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, stop) of a row-major array, cut into blocks (corner, sides) in their order."""
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    first, last = -(-start // inner), stop // inner  # rows that are whole
    if first > last:  # the run begins and ends within one row
        yield from _row(shape, last, start, stop)
        return
    if start < first * inner:
        yield from _row(shape, first - 1, start, first * inner)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * inner < stop:
        yield from _row(shape, last, last * inner, stop)


def _row(
    shape: tuple[int, ...], row: int, start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    inner = math.prod(shape[1:])
    for corner, sides in _blocks(shape[1:], start - row * inner, stop - row * inner):
        yield (row, *corner), (1, *sides)
