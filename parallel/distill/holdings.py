"""Which rows, columns and heads of a tensor each rank holds, or wants: all that follows from layouts alone.

Shapes: B rows, S columns, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

from headway.parallel.context import layout as zigzag
from headway.parallel.mesh import AXES, Layout


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout: its number along every axis."""

    pipeline: int = 0
    replicate: int = 0
    shard: int = 0
    context: int = 0
    tensor: int = 0


def places(layout: Layout) -> list[Place]:
    """Of all ranks of a layout, in their order."""
    found = [Place()]
    for axis in AXES:
        size = getattr(layout, axis)
        found = [Place(**{**place.__dict__, axis: i}) for place in found for i in range(size)]
    return found


@dataclass(frozen=True)
class Holding:
    """A box of a tensor [B, S, H, ...], or of its first dims: numbers of rows, of columns, of heads, in the order in
    which they stand; rows count over all ranks, columns over the whole sequence, heads over the whole model."""

    dims: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, *dims: tuple[int, ...]) -> Holding:
        return cls(dims)

    @property
    def empty(self) -> bool:
        return not all(self.dims)


def nothing(dims: int) -> Holding:
    """What a rank wants that wants nothing."""
    return Holding(((),) * dims)


def data_rank(place: Place, layout: Layout) -> int:
    """Which rows are a rank's."""
    return place.replicate * layout.shard + place.shard


def row_ranges(sizes: list[int]) -> list[tuple[int, ...]]:
    """Numbers of the rows of every data rank, of so many each."""
    found, begin = [], 0
    for size in sizes:
        found.append(tuple(range(begin, begin + size)))
        begin += size
    return found


def even(total: int, parts: int) -> list[int]:
    """A total cut into nearly equal parts."""
    return [(i + 1) * total // parts - i * total // parts for i in range(parts)]


def columns_of(total: int, layout: Layout, place: Place) -> tuple[int, ...]:
    """The columns of a sequence that a rank has, in their order there."""
    if layout.context == 1:
        return tuple(range(total))
    runs = zigzag.runs(total, layout.context, place.context)
    return tuple(number for run in runs for number in run)


def share(numbers: tuple[int, ...], layout: Layout, place: Place) -> tuple[int, ...]:
    """A tensor rank's part of numbers that are cut evenly."""
    part = len(numbers) // layout.tensor
    return numbers[place.tensor * part : (place.tensor + 1) * part]
