"""Biases of scores that follow from places alone: described, so that a kernel computes the block that it needs.

Shapes: H query heads, Q queries, K keys.
"""

from __future__ import annotations

from typing import NamedTuple, overload

import torch
from torch import Tensor

_ALL = slice(None)


class Slopes(NamedTuple):
    """-slope |i - j|, a slope for every head (ALiBi, Press et al. 2022, section 3). It stands wherever a kernel takes a
    bias [H, Q, K]; it has no gradient.

    Attributes:
        slopes: fp32 [H], of the heads that are here.
        queries, keys: int64 [Q] and [K], their places in the sequence.
    """

    slopes: Tensor
    queries: Tensor
    keys: Tensor

    def block(self, queries: slice | Tensor = _ALL, keys: slice | Tensor = _ALL) -> Tensor:
        """The bias of some queries and keys, fp32 [H, Q, K]."""
        apart_QK = (self.keys[keys] - self.queries[queries][:, None]).abs()
        return -self.slopes[:, None, None] * apart_QK

    def of(self, queries: slice = _ALL, keys: slice = _ALL) -> Slopes:
        """The description of some queries and keys."""
        return Slopes(self.slopes, self.queries[queries], self.keys[keys])

    def of_heads(self, first: int, count: int) -> Slopes:
        """The description of some heads."""
        return self._replace(slopes=self.slopes[first : first + count])

    def every(self, first: int, step: int) -> Slopes:
        """The description of every so many heads."""
        return self._replace(slopes=self.slopes[first::step])


class Distances(NamedTuple):
    """A bias that is a table of the distance from query to key, for models that are not trained: it has no gradient.

    Attributes:
        table: [H, R], of distances (key's place minus query's) from -`zero` on.
        zero: where distance 0 stands.
        queries, keys: int64 [Q] and [K], their places.
    """

    table: Tensor
    zero: int
    queries: Tensor
    keys: Tensor

    @classmethod
    def whole(cls, table_HR: Tensor, length: int) -> Distances:
        """Of a sequence to itself."""
        places = torch.arange(length, device=table_HR.device)
        return cls(table_HR, table_HR.shape[1] // 2, places, places)

    def block(self, queries: slice | Tensor = _ALL, keys: slice | Tensor = _ALL) -> Tensor:
        """The bias of some queries and keys, [H, Q, K]."""
        return self.table[:, self.keys[keys] - self.queries[queries][:, None] + self.zero]

    def of(self, queries: slice | Tensor = _ALL, keys: slice = _ALL) -> Distances:
        """The description of some queries and keys."""
        return self._replace(queries=self.queries[queries], keys=self.keys[keys])

    def of_heads(self, first: int, count: int) -> Distances:
        """The description of some heads."""
        return self._replace(table=self.table[first : first + count])

    def every(self, first: int, step: int) -> Distances:
        """The description of every so many heads."""
        return self._replace(table=self.table[first::step])


Bias = Tensor | Slopes
"""[H, Q, K], or what describes it."""

Fixed = Bias | Distances
"""The same, of a model that is not trained."""

Flat = tuple[Tensor | None, Tensor | None]
"""Slopes and all places, as a function of autograd takes them: the compiler wants no tensor in two of its inputs, and
places of queries may be those of keys."""


def flat(bias: Bias | None) -> Flat:
    """What describes a bias, if anything does."""
    if not isinstance(bias, Slopes):
        return None, None
    return bias.slopes, torch.cat((bias.queries, bias.keys))


def restored(slopes: Tensor | None, places: Tensor | None, queries: int) -> Slopes | None:
    """What was made flat; `queries`: how many there are."""
    if slopes is None or places is None:
        return None
    return Slopes(slopes, places[:queries], places[queries:])


def geometric(heads: int) -> list[float]:
    """The slopes of the paper's code: 2^(-8 i / n) for i = 1 ... n; where n is no power of two, those of the power
    below, then every second, from the first on, of twice that."""
    below = 1 << (heads.bit_length() - 1)
    found = [2 ** (-8 * (i + 1) / below) for i in range(below)]
    return found + [2 ** (-4 * (2 * i + 1) / below) for i in range(heads - below)]


def block_of(bias: Fixed, queries: slice | Tensor = _ALL, keys: slice | Tensor = _ALL) -> Tensor:
    """Some queries and keys of a bias, [H, Q, K]."""
    if not isinstance(bias, Tensor):
        return bias.block(queries, keys)
    return bias[:, queries][:, :, keys]


@overload
def part_of(bias: Bias, queries: slice = _ALL, keys: slice = _ALL) -> Bias: ...


@overload
def part_of(bias: Fixed, queries: slice = _ALL, keys: slice = _ALL) -> Fixed: ...


def part_of(bias: Fixed, queries: slice = _ALL, keys: slice = _ALL) -> Fixed:
    """Some queries and keys of a bias, described as it was."""
    return bias[:, queries, keys] if isinstance(bias, Tensor) else bias.of(queries, keys)


def learned(bias: Fixed | None) -> Tensor | None:
    """The bias if it is a tensor, which may want a gradient."""
    return bias if isinstance(bias, torch.Tensor) else None
