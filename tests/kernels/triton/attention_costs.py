"""What launches of attention's kernels move and multiply, by going through their loops, tile by tile, once for all
samples and heads that are alike.

Shapes: B batch, H query heads, Q queries, K keys; M queries and N keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from headway.kernels.triton.attention_tiles import Spans
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Cost, once


class Walk(NamedTuple):
    """What a launch goes through.

    Attributes:
        given: its arguments.
        m, n: sizes of tiles.
        batch, heads, queries, keys: how many there are.
        prefixes: of the samples, or None.
        spans: of the samples' documents, or None.
    """

    given: dict[str, Any]
    m: int
    n: int
    batch: int
    heads: int
    queries: int
    keys: int
    prefixes: list[int] | None
    spans: Spans | None

    @staticmethod
    def of(launch: Launch) -> Walk:
        given = launch.arguments
        prefix = given["seen"].prefix if given["CAUSAL"] else None
        prefixes = None if prefix is None else prefix.tolist()
        return Walk(given, given["M"], given["N"], *given["sizes"], prefixes, given.get("spans"))

    def samples(self) -> list[tuple[int, int]]:
        """How many samples are alike, and the first of them."""
        if self.prefixes is None and self.spans is None:
            return [(self.batch, 0)]
        return [(1, b) for b in range(self.batch)]

    def span(self, firsts: Any, lasts: Any, b: int, first: int, block: int) -> tuple[int, int]:
        """The least and the most of a block's spans."""
        here = slice(first, first + block)
        return int(firsts[b, here].min()), int(lasts[b, here].max())

    def key_tiles(self, first: int, b: int) -> range:
        """First keys of the tiles that M queries go through."""
        start, stop = 0, self.keys
        prefix = 0 if self.prefixes is None else self.prefixes[b]
        if self.given["CAUSAL"]:
            stop = max(min(stop, first + self.m), min(self.keys, prefix))
        window = self.given["seen"].window
        if window is not None:
            start = max(0, first - window + 1) // self.n * self.n
            stop = min(stop, first + self.m + window - 1)
        if self.spans is not None:
            least, most = self.span(*self.spans[:2], b, first, self.m)
            start, stop = max(start, least // self.n * self.n), min(stop, most + 1)
        return range(start, stop, self.n)

    def query_tiles(self, first: int, b: int) -> range:
        """First queries of the tiles that N keys go through."""
        start, stop = 0, self.queries
        prefix = 0 if self.prefixes is None else self.prefixes[b]
        if self.given["CAUSAL"]:
            start = 0 if first < prefix else first
        window = self.given["seen"].window
        if window is not None:
            start = max(start, first - window + 1)
            stop = min(stop, first + self.n + window - 1)
        start = start // self.m * self.m
        if self.spans is not None:
            least, most = self.span(*self.spans[2:], b, first, self.n)
            start, stop = max(start, least // self.m * self.m), min(stop, most + 1)
        return range(start, stop, self.m)

    def by_queries(self) -> Iterator[tuple[int, int, int, int]]:
        """Blocks of queries: how many are alike, queries, tiles, keys of them all."""
        for count, b in self.samples():
            for first in range(0, self.queries, self.m):
                tiles = self.key_tiles(first, b)
                keys = sum(min(self.n, self.keys - key) for key in tiles)
                yield count * self.heads, min(self.m, self.queries - first), len(tiles), keys

    @property
    def item(self) -> int:
        return int(self.given["model"].q.data.element_size())

    @property
    def widths(self) -> tuple[int, int, int, int]:
        return tuple(self.given[name] for name in ("D", "D_V", "W", "W_V"))  # type: ignore[return-value]

    def ranges(self, block: int) -> int:
        """Bytes that a program reads to know its tiles."""
        return (4 if self.prefixes is not None else 0) + (8 * block if self.spans is not None else 0)

    def numbers(self, rows: int, cols: int, tiles: int, pairs: int) -> int:
        """Bytes beside operands that tiles read: rows and columns of them all, and pairs of both."""
        seen, drop, bias = self.given["seen"], self.given["drop"], self.given["model"].bias
        found = 0
        if bias.dense is not None:
            found += pairs * bias.dense.element_size()
        if bias.slopes is not None:
            found += (rows + cols) * 4 + tiles * bias.slopes.element_size()
        if self.prefixes is not None:
            found += tiles * 4
        if seen.documents is not None:
            found += (rows + cols) * 4
        if seen.allowed is not None:
            found += pairs
        if drop is not None:
            found += rows * 8 + tiles * 16
        return found


def forward(launch: Launch) -> Cost:
    """Of `attention_forward_kernel`."""
    walk = Walk.of(launch)
    d, d_v, w, w_v = walk.widths
    sink = walk.given["sink"]
    read = products = 0
    for count, rows, tiles, keys in walk.by_queries():
        each = rows * d * walk.item + keys * (d + d_v) * walk.item
        each += walk.numbers(rows * tiles, keys, tiles, rows * keys)
        each += walk.ranges(rows) + (0 if sink is None else sink.element_size())
        read += count * each
        products += count * tiles * 2 * walk.m * walk.n * (w + w_v)
    rows = walk.batch * walk.heads * walk.queries
    return Cost(read, rows * (d_v * walk.item + 4), once(launch), products, _others(walk, products))


def delta(launch: Launch) -> Cost:
    """Of `attention_delta_kernel`."""
    given = launch.arguments
    sizes, item = given["sizes"], given["out"].data.element_size()
    rows = sizes.batch * sizes.heads * sizes.queries
    return Cost(rows * 2 * given["D_V"] * item, rows * 4, once(launch), 0, 2 * rows * given["D_V"])


def queries(launch: Launch) -> Cost:
    """Of `attention_queries_kernel`."""
    walk = Walk.of(launch)
    d, d_v, w, w_v = walk.widths
    read = products = 0
    for count, rows, tiles, keys in walk.by_queries():
        each = rows * ((d + d_v) * walk.item + 8) + keys * (d + d_v) * walk.item
        each += walk.numbers(rows * tiles, keys, tiles, rows * keys)
        read += count * (each + walk.ranges(rows))
        products += count * tiles * 2 * walk.m * walk.n * (2 * w + w_v)
    rows = walk.batch * walk.heads * walk.queries
    return Cost(read, rows * d * walk.item, once(launch), products, _others(walk, products))


def keys(launch: Launch) -> Cost:
    """Of `attention_keys_kernel`."""
    walk = Walk.of(launch)
    d, d_v, w, w_v = walk.widths
    group = walk.given["model"].group
    of_keys, of_values = (walk.given[name] is not None for name in ("dk", "dv"))
    dots = (w + w_v if of_keys else 0) + (w_v if of_values else 0) + w
    read = products = 0
    for count, b in walk.samples():
        for first in range(0, walk.keys, walk.n):
            here, tiles = min(walk.n, walk.keys - first), walk.query_tiles(first, b)
            rows = sum(min(walk.m, walk.queries - query) for query in tiles)
            each = rows * ((d + d_v) * walk.item + (8 if of_keys else 4))
            each += walk.numbers(rows, here * len(tiles), len(tiles), rows * here)
            own = here * (d + (d_v if of_keys else 0)) * walk.item + walk.ranges(here)
            read += count * (walk.heads // group) * (own + group * each)
            products += count * walk.heads * len(tiles) * 2 * walk.m * walk.n * dots
    wide = (d if of_keys else 0) + (d_v if of_values else 0)
    written = walk.batch * walk.heads // group * walk.keys * wide * walk.item
    return Cost(read, written, once(launch), products, _others(walk, products))


def bias(launch: Launch) -> Cost:
    """Of `attention_bias_kernel`."""
    walk = Walk.of(launch)
    d, d_v, w, w_v = walk.widths
    read = products = 0
    for first in range(0, walk.queries, walk.m):
        rows = min(walk.m, walk.queries - first)
        seen = walk.key_tiles(first, 0)
        for key in range(0, walk.keys, walk.n):
            cols = min(walk.n, walk.keys - key)
            hidden = not (key < seen.stop and key + walk.n > seen.start)
            if walk.prefixes is None and hidden:
                continue
            each = (rows + cols) * (d + d_v) * walk.item + rows * 8 + walk.numbers(rows, cols, 1, rows * cols)
            read += walk.heads * walk.batch * each
            products += walk.heads * walk.batch * 2 * walk.m * walk.n * (w + w_v)
    written = walk.heads * walk.queries * walk.keys * 4
    return Cost(read, written, once(launch), products, _others(walk, products))


def _others(walk: Walk, products: float) -> float:
    """Some ten operations a pair, and as many again for dropout's numbers."""
    pairs = products / 2 / (walk.given["W"] + walk.given["W_V"])
    return pairs * (10 if walk.given["drop"] is None else 20)
