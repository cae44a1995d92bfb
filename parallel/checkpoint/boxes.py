"""Boxes: the rectangular parts that a tensor is cut into, in the coordinates of the whole tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """The elements `offset[d] <= i_d < offset[d] + shape[d]` of a tensor; a scalar's box has no dims."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, shape: Iterable[int]) -> Box:
        """The box of a whole tensor of this shape."""
        shape = tuple(shape)
        return cls((0,) * len(shape), shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def stop(self) -> tuple[int, ...]:
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    def overlap(self, other: Box) -> Box | None:
        """What two boxes of one tensor share, or None if that is nothing."""
        start = tuple(map(max, self.offset, other.offset))
        shape = tuple(b - a for a, b in zip(start, map(min, self.stop, other.stop), strict=True))
        return Box(start, shape) if all(n > 0 for n in shape) else None

    def within(self, outer: Box) -> tuple[slice, ...]:
        """Slices that cut this box out of a tensor that holds exactly `outer`."""
        return tuple(
            slice(o - base, o - base + n)
            for o, base, n in zip(self.offset, outer.offset, self.shape, strict=True)
        )

    def __str__(self) -> str:
        return "[" + ",".join(f"{a}:{b}" for a, b in zip(self.offset, self.stop, strict=True)) + "]"


def flaw(boxes: Iterable[Box], shape: tuple[int, ...]) -> str | None:
    """Why `boxes` do not cover a tensor of `shape` exactly once each element, or None if they do.

    A sweep along the dim that is cut most compares only boxes that are side by side there: n shards of one
    dim cost n log n, a grid of r x c costs r c min(r, c).
    """
    boxes, whole = list(boxes), Box.whole(shape)
    for box in boxes:
        if len(box.shape) != len(shape) or any(map(int.__lt__, whole.stop, box.stop)):
            return f"the piece {box} does not lie inside the shape {list(shape)}"
    if not shape:  # a scalar
        return None if len(boxes) == 1 else f"has {len(boxes)} pieces, a scalar has one"
    dim = max(range(len(shape)), key=lambda d: len({box.offset[d] for box in boxes}))
    beside: list[Box] = []
    for box in sorted(boxes, key=lambda b: b.offset[dim]):
        beside = [other for other in beside if other.stop[dim] > box.offset[dim]]
        for other in beside:
            if box.overlap(other):
                return f"the pieces {other} and {box} overlap"
        beside.append(box)
    if (count := sum(box.numel for box in boxes)) != whole.numel:
        return f"its pieces hold {count} of {whole.numel} elements"
    return None
