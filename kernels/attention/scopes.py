"""Scopes: which places a query sees by where they stand, whatever they hold, beside what else a mask says.

A scope is a description. `sees` is its specification, on places; `ranges` tells kernels which keys a block of queries
can see, so that they compute no others; `pairs` counts what is seen, for costs. A causal mask takes the keys after a
query away from all of them.

Shapes: Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from headway.kernels import random


@dataclass(frozen=True)
class Scope:
    """Base: what a kernel asks of every scope. `total` is the length of the whole sequence."""

    scattered = False
    """Whether keys that a query sees lie apart: blocks of keys hold more that is not seen than what is."""

    @property
    def rows(self) -> int:
        """Queries in a row that see about the same keys."""
        return 128

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        """Places int64 [Q, 1] and [1, K] -> bool [Q, K]."""
        raise NotImplementedError

    def test(self, total: int, causal: bool, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        """`sees` of any places that broadcast, for kernels that ask place by place."""
        return lambda query, key: self.sees(query, key, total, causal)

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        """Runs of keys of which some query of a run of queries may see one; they may overlap."""
        raise NotImplementedError

    def phases(self) -> tuple[Scope, ...]:
        """Scopes that share no pair and together are this one; where weights can be merged, each is computed alone."""
        return (self,)

    @property
    def step(self) -> int:
        """Places from a query to the next one that sees about the same keys, which are as far apart."""
        return 1

    def pairs(self, total: int, causal: bool) -> int:
        """How many pairs of a query and a key it leaves of a sequence's."""
        raise NotImplementedError

    def kept(self, total: int) -> int:
        """Places of a causal sequence that a later query may see."""
        return total


@dataclass(frozen=True)
class Window(Scope):
    """Keys less than `width` places away (Beltagy et al. 2020, section 3.1; Mistral's `sliding_window`)."""

    width: int

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        return (queries - keys).abs() < self.width

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        return [range(queries.start - self.width + 1, queries.stop + self.width - 1)]

    def pairs(self, total: int, causal: bool) -> int:
        before = _within(total, self.width)
        return before if causal else 2 * before - total

    def kept(self, total: int) -> int:
        return min(total, self.width)


@dataclass(frozen=True)
class Dilated(Scope):
    """Every `dilation`-th key of a window `dilation` times as wide (Beltagy et al. 2020, section 3.1)."""

    scattered = True
    width: int
    dilation: int

    @property
    def step(self) -> int:
        return self.dilation

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        apart = (queries - keys).abs()
        return (apart < self.width * self.dilation) & (apart % self.dilation == 0)

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        return Window(self.width * self.dilation).ranges(queries, total, causal)

    def pairs(self, total: int, causal: bool) -> int:
        lengths = [len(range(first, total, self.dilation)) for first in range(min(self.dilation, total))]
        before = sum(_within(length, self.width) for length in lengths)
        return before if causal else 2 * before - total

    def kept(self, total: int) -> int:
        return min(total, self.width * self.dilation)


@dataclass(frozen=True)
class Local(Scope):
    """Keys of the query's own block and of so many blocks beside it (Parmar et al. 2018, section 3.3)."""

    block: int
    neighbours: int

    @property
    def rows(self) -> int:
        return -(-64 // self.block) * self.block

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        return (queries // self.block - keys // self.block).abs() <= self.neighbours

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        first, last = queries.start // self.block, (queries.stop - 1) // self.block
        return [range((first - self.neighbours) * self.block, (last + self.neighbours + 1) * self.block)]

    def pairs(self, total: int, causal: bool) -> int:
        sizes = [min(self.block, total - start) for start in range(0, total, self.block)]
        own = sum(size * (size + 1) // 2 if causal else size * size for size in sizes)
        beside = sum(
            sizes[i] * sizes[i - apart]
            for apart in range(1, self.neighbours + 1)
            for i in range(apart, len(sizes))
        )
        return own + (beside if causal else 2 * beside)

    def kept(self, total: int) -> int:
        return min(total, self.block * (self.neighbours + 1))


@dataclass(frozen=True)
class Strided(Scope):
    """Keys less than `stride` places away, and every `stride`-th one (Child et al. 2019, section 4.2, both heads of the
    factorisation in one, their equation 7)."""

    stride: int

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        apart = (queries - keys).abs()
        return (apart < self.stride) | (apart % self.stride == 0)

    def phases(self) -> tuple[Scope, ...]:
        return Window(self.stride), Comb(self.stride)

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        return [range(total)]

    def pairs(self, total: int, causal: bool) -> int:
        before = _within(total, self.stride) + sum(i // self.stride for i in range(total))
        return before if causal else 2 * before - total


@dataclass(frozen=True)
class Comb(Scope):
    """Every `stride`-th key, but for the query itself: what strided attention sees beyond its window."""

    scattered = True
    stride: int

    @property
    def step(self) -> int:
        return self.stride

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        apart = (queries - keys).abs()
        return (apart >= self.stride) & (apart % self.stride == 0)

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        return [range(total)]

    def pairs(self, total: int, causal: bool) -> int:
        before = sum(i // self.stride for i in range(total))
        return before if causal else 2 * before


@dataclass(frozen=True)
class Fixed(Scope):
    """Keys of the query's own block of `stride`, and the last `summaries` of every block (Child et al. 2019, section
    4.2)."""

    stride: int
    summaries: int

    @property
    def rows(self) -> int:
        return -(-64 // self.stride) * self.stride

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        own = queries // self.stride == keys // self.stride
        return own | (keys % self.stride >= self.stride - self.summaries)

    def phases(self) -> tuple[Scope, ...]:
        return Local(self.stride, 0), Ends(self.stride, self.summaries)

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        first, last = queries.start // self.stride, (queries.stop - 1) // self.stride
        own = [range(first * self.stride, (last + 1) * self.stride)]
        ends = range(self.stride, (queries.stop if causal else total + self.stride) + 1, self.stride)
        return own + [range(end - self.summaries, end) for end in ends]

    def pairs(self, total: int, causal: bool) -> int:
        own = Local(self.stride, 0).pairs(total, causal)
        sizes = [min(self.stride, total - start) for start in range(0, total, self.stride)]
        kept = [max(0, size - self.stride + self.summaries) for size in sizes]
        if causal:
            return own + sum(sum(kept[:i]) * size for i, size in enumerate(sizes))
        return own + sum((sum(kept) - kept[i]) * size for i, size in enumerate(sizes))

    def kept(self, total: int) -> int:
        return min(total, self.stride + total // self.stride * self.summaries)


@dataclass(frozen=True)
class Ends(Scope):
    """The last `summaries` keys of every block but the query's own: what fixed attention sees beyond its block."""

    scattered = True
    stride: int
    summaries: int

    @property
    def rows(self) -> int:
        return Fixed(self.stride, self.summaries).rows

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        other = queries // self.stride != keys // self.stride
        return other & (keys % self.stride >= self.stride - self.summaries)

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        return Fixed(self.stride, self.summaries).ranges(queries, total, causal)[1:]

    def pairs(self, total: int, causal: bool) -> int:
        whole = Fixed(self.stride, self.summaries).pairs(total, causal)
        return whole - Local(self.stride, 0).pairs(total, causal)

    def places(self, total: int) -> Tensor:
        """The keys that any query may see."""
        places = torch.arange(total)
        return places[places % self.stride >= self.stride - self.summaries]


@dataclass(frozen=True)
class OtherBlocks(Scope):
    """Of keys that stand for blocks of queries, `each` for a block of `stride`, those of other blocks than the query's,
    or (`before`) of those before it."""

    stride: int
    each: int
    before: bool

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        asking, asked = queries // self.stride, keys // self.each
        return asked < asking if self.before else asked != asking

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        last = (queries.stop - 1) // self.stride * self.each
        return [range(min(total, last) if self.before else total)]


@dataclass(frozen=True)
class Global(Scope):
    """A window, and the first `tokens` of a row: all see these, and (`both`) these see all.

    With `both`, Longformer (Beltagy et al. 2020, section 3.1), projections shared; without, a window with kept first
    tokens as sinks (Xiao et al. 2024).
    """

    width: int
    tokens: int
    both: bool

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        seen = ((queries - keys).abs() < self.width) | (keys < self.tokens)
        return seen | (queries < self.tokens) if self.both else seen

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        if self.both and queries.start < self.tokens:
            return [range(total)]
        return [range(self.tokens), *Window(self.width).ranges(queries, total, causal)]

    def pairs(self, total: int, causal: bool) -> int:
        first = min(self.tokens, total)
        window = Window(self.width).pairs(total, causal)
        # Pairs of a query and one of the first tokens before it that its window does not hold.
        far = sum(min(first, max(0, i - self.width + 1)) for i in range(total))
        if causal:
            return window + far
        within = sum(max(0, i - self.width + 1) for i in range(first))  # of those, both among the first
        return window + (2 * far if self.both else far + within)

    def kept(self, total: int) -> int:
        return min(total, self.width + self.tokens)


@dataclass(frozen=True)
class BigBird(Scope):
    """In blocks: the query's own and those beside it, the first `first` blocks, and `random` more (Zaheer et al. 2020,
    section 2); the first blocks see all. What is drawn depends on `key`, the block, and how many there are."""

    block: int
    first: int
    random: int
    key: int

    def chosen(self, block: int, blocks: int, causal: bool) -> tuple[int, ...]:
        """The random blocks of a block of queries, distinct, neither beside it nor among the first."""
        return _drawn(self.key, block, self.first, blocks, self.random, causal)

    @property
    def rows(self) -> int:
        return self.block

    def sees(self, queries: Tensor, keys: Tensor, total: int, causal: bool) -> Tensor:
        return self.test(total, causal, queries.device)(queries, keys)

    def test(self, total: int, causal: bool, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
        table = _table(self, -(-total // self.block), causal).to(device)

        def seen(query: Tensor, key: Tensor) -> Tensor:
            asking, asked = query // self.block, key // self.block
            near = ((asking - asked).abs() <= 1) | (asked < self.first) | (asking < self.first)
            return near | (table[asking] == asked.unsqueeze(-1)).any(-1)

        return seen

    def ranges(self, queries: range, total: int, causal: bool) -> list[range]:
        first, last = queries.start // self.block, (queries.stop - 1) // self.block
        if first < self.first:
            return [range(total)]
        blocks = -(-total // self.block)
        picked = {i for row in range(first, last + 1) for i in self.chosen(row, blocks, causal)}
        runs = [range(self.first), range(first - 1, last + 2), *(range(i, i + 1) for i in sorted(picked))]
        return [range(run.start * self.block, run.stop * self.block) for run in runs]

    def pairs(self, total: int, causal: bool) -> int:
        sizes = [min(self.block, total - start) for start in range(0, total, self.block)]
        blocks, found = len(sizes), 0
        for i, size in enumerate(sizes):
            seen = {*range(blocks)} if i < self.first else {*range(min(self.first, blocks))}
            seen |= {*range(max(0, i - 1), min(blocks, i + 2)), *self.chosen(i, blocks, causal)}
            if causal:
                found += sum(size * sizes[j] for j in seen if j < i) + size * (size + 1) // 2
            else:
                found += sum(size * sizes[j] for j in seen)
        return found


@lru_cache(maxsize=64)
def _table(scope: BigBird, blocks: int, causal: bool) -> Tensor:
    """The random blocks of all blocks, int64 [blocks, random], -1 where there are fewer."""
    drawn = [scope.chosen(i, blocks, causal) for i in range(blocks)]
    return torch.tensor([[*row, *[-1] * (max(1, scope.random) - len(row))] for row in drawn])


@lru_cache(maxsize=1 << 16)
def _drawn(key: int, block: int, first: int, blocks: int, count: int, causal: bool) -> tuple[int, ...]:
    """Distinct blocks, uniformly among those that are far: Floyd's algorithm."""
    if block < first:
        return ()
    before, after = max(0, block - 1 - first), 0 if causal else max(0, blocks - block - 2)
    far, picked = before + after, list[int]()
    for last in range(max(0, far - count), far):
        u = float(random.uniform(key, torch.tensor(block), last))
        one = min(last, int(u * (last + 1)))
        picked.append(last if one in picked else one)
    return tuple(first + i if i < before else block + 2 + i - before for i in sorted(picked))


def _within(total: int, width: int) -> int:
    """Pairs of a place and one less than `width` before it, itself included."""
    near = min(width, total)
    return near * (near + 1) // 2 + (total - near) * near


def joined(ranges: list[range], start: int, stop: int) -> list[slice]:
    """Sorted, disjoint slices of [start, stop) that cover the ranges; at least one key."""
    found: list[list[int]] = []
    for run in sorted(ranges, key=lambda r: r.start):
        low, high = max(start, run.start), min(stop, run.stop)
        if low >= high:
            continue
        if found and low <= found[-1][1]:
            found[-1][1] = max(found[-1][1], high)
        else:
            found.append([low, high])
    return [slice(low, high) for low, high in found] or [slice(stop - 1, stop)]
