"""What launches of map distillation's kernels move and multiply, by going through their loops.

Shapes: B batch, H student heads, G teacher heads for each, Q queries, K keys; M queries and N keys of a tile.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from headway.tests.kernels.triton.attention_costs import Walk
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Cost, once


class Tiles(NamedTuple):
    """What a block goes through.

    Attributes:
        blocks: how many are alike.
        rows: queries, of a block that owns them; of all its tiles, of one that owns keys.
        cols: keys, of all its tiles; of a block that owns them.
        count: of tiles.
        pairs: of queries and keys, of all tiles.
    """

    blocks: int
    rows: int
    cols: int
    count: int
    pairs: int


def _by_queries(walk: Walk) -> list[Tiles]:
    return [Tiles(n, rows, cols, tiles, rows * cols) for n, rows, tiles, cols in walk.by_queries()]


def _by_keys(walk: Walk) -> list[Tiles]:
    """Of query heads, each by itself."""
    found = []
    for count, b in walk.samples():
        for first in range(0, walk.keys, walk.n):
            cols, tiles = min(walk.n, walk.keys - first), walk.query_tiles(first, b)
            rows = sum(min(walk.m, walk.queries - query) for query in tiles)
            found.append(Tiles(count * walk.heads, rows, cols, len(tiles), rows * cols))
    return found


def _model(walk: Walk, name: str, owned: Tiles, tiles: Tiles, group: int = 1) -> int:
    """Bytes of a model's scores: owned rows or columns are read once where they are held, else for every tile.
    `owned`: rows and columns that a block's tiles read if so, `tiles`: if not."""
    model = walk.given[name]
    width, item = model.q.data.shape[-1], model.q.data.element_size()
    own = owned if group == 1 and _held(walk, name) else tiles
    found = 0
    if model.bias.dense is not None:
        found += tiles.pairs * model.bias.dense.element_size()
    if model.bias.slopes is not None:
        found += (tiles.rows + tiles.cols) * 4 + tiles.count * model.bias.slopes.element_size()
    return group * (found + (own.rows + own.cols) * width * item)


def _held(walk: Walk, name: str) -> bool:
    """Whether all columns of a head are multiplied at once, so that they are kept from tile to tile."""
    suffix = {"teacher": "_T", "student": "_S"}.get(name, "")
    return bool(walk.given[f"D{suffix}"] <= walk.given[f"W{suffix}"])


def _seen(walk: Walk, tiles: Tiles) -> int:
    """Bytes of a mask that tiles read."""
    seen = walk.given["seen"]
    found = 0
    if seen.counts is not None:
        found += tiles.rows
    if walk.prefixes is not None:
        found += tiles.count * 4
    if seen.documents is not None:
        found += (tiles.rows + tiles.cols) * 4
    if seen.allowed is not None:
        found += tiles.pairs
    return found


def _group(walk: Walk) -> int:
    return int(walk.given.get("G", 1))


def _widths(walk: Walk) -> int:
    """Of the products of both models' scores."""
    return _group(walk) * _width(walk, "_T") + _width(walk, "_S")


def _width(walk: Walk, whose: str) -> int:
    """Of the products of a model's scores: whole parts of its heads."""
    d, w = (int(walk.given[name + whose]) for name in "DW")
    return -(-d // w) * w


def _log_sums_of(walk: Walk) -> int:
    """Bytes of a row's log-sum-exps of the teacher."""
    return 0 if walk.given["lse_t"] is None else 4 * _group(walk)


def _kept(walk: Walk) -> int:
    """Bytes of a row of the student's numbers that gradients need."""
    return sum(4 for name in ("lse_s", "centres", "shares") if walk.given[name] is not None)


def _columns(walk: Walk) -> int:
    """Bytes of a row or column of the part that a launch multiplies gradients of scores with, if that is read again."""
    columns = walk.given["columns"]
    return 0 if columns is None else int(walk.given["D_P"] * columns.data.element_size())


def _wide(tiles: Tiles) -> Tiles:
    """A block of queries as its tiles read it: rows again for every tile."""
    return tiles._replace(rows=tiles.rows * tiles.count)


def _turned(tiles: Tiles) -> Tiles:
    """A block of keys as its tiles read it: columns again for every tile."""
    return tiles._replace(cols=tiles.cols * tiles.count)


def log_sums(launch: Launch) -> Cost:
    """Of `map_log_sums_kernel`."""
    walk = Walk.of(launch)
    read = products = 0
    for tiles in _by_queries(walk):
        all_ = _wide(tiles)
        each = _model(walk, "model", tiles, all_) + _seen(walk, all_) + walk.ranges(tiles.rows)
        read += tiles.blocks * each
        products += tiles.blocks * tiles.count * 2 * walk.m * walk.n * _width(walk, "")
    return Cost(read, 4 * _rows(walk), once(launch), products, products / _width(walk, "") / 2 * 8)


def _rows(walk: Walk) -> int:
    return walk.batch * walk.heads * walk.queries


def divergence(launch: Launch) -> Cost:
    """Of `map_divergence_kernel`."""
    walk = Walk.of(launch)
    read = products = 0
    for tiles in _by_queries(walk):
        all_ = _wide(tiles)
        each = sum(_model(walk, name, tiles, all_) for name in ("teacher", "student"))
        read += tiles.blocks * (each + _seen(walk, all_) + walk.ranges(tiles.rows))
        products += tiles.blocks * tiles.count * 2 * walk.m * walk.n * _widths(walk)
    return Cost(read, 12 * _rows(walk), once(launch), products, _others(walk, products))


def terms(launch: Launch) -> Cost:
    """Of `map_terms_kernel`."""
    walk = Walk.of(launch)
    own = 0 if walk.given["lse_s"] is None else 4
    read = products = 0
    for tiles in _by_queries(walk):
        all_ = _wide(tiles)
        each = _model(walk, "teacher", tiles, all_, _group(walk)) + _model(walk, "student", tiles, all_)
        each += tiles.rows * own + all_.rows * _log_sums_of(walk)
        read += tiles.blocks * (each + _seen(walk, all_) + walk.ranges(tiles.rows))
        products += tiles.blocks * tiles.count * 2 * walk.m * walk.n * _widths(walk)
    written = (4 if walk.given["centres"] is None else 8) * _rows(walk)
    written += 0 if walk.given["shares"] is None else 4 * walk.batch * walk.queries
    return Cost(read, written, once(launch), products, _others(walk, products))


def queries(launch: Launch) -> Cost:
    """Of `map_queries_kernel`."""
    walk = Walk.of(launch)
    read = products = 0
    for tiles in _by_queries(walk):
        all_ = _wide(tiles)
        each = _model(walk, "teacher", tiles, all_, _group(walk)) + _model(walk, "student", tiles, all_)
        each += all_.rows * (_log_sums_of(walk) + _kept(walk)) + tiles.cols * _columns(walk) + 4
        read += tiles.blocks * (each + _seen(walk, all_) + walk.ranges(tiles.rows))
        products += tiles.blocks * tiles.count * 2 * walk.m * walk.n * (_widths(walk) + walk.given["W_P"])
    return Cost(read, _bytes(walk, "dq"), once(launch), products, _others(walk, products))


def keys(launch: Launch) -> Cost:
    """Of `map_keys_kernel`: a student's keys are read once for all the query heads that read them."""
    walk = Walk.of(launch)
    student, members = walk.given["student"].k.data, walk.given["student"].group
    held = _held(walk, "student")
    read = products = 0
    for tiles in _by_keys(walk):
        all_ = _turned(tiles)
        each = _model(walk, "teacher", tiles, all_, _group(walk))
        each += _model(walk, "student", tiles._replace(cols=0), all_)
        each += tiles.rows * (_log_sums_of(walk) + _kept(walk) + _columns(walk)) + _seen(walk, all_)
        own = walk.ranges(tiles.cols) + 4
        own += tiles.cols * student.shape[-1] * student.element_size() if held else 0
        read += tiles.blocks * each + tiles.blocks // members * own
        products += tiles.blocks * tiles.count * 2 * walk.m * walk.n * (_widths(walk) + walk.given["W_P"])
    return Cost(read, _bytes(walk, "dk"), once(launch), products, _others(walk, products))


def bias(launch: Launch) -> Cost:
    """Of `map_bias_kernel`."""
    walk = Walk.of(launch)
    read = products = 0
    for first in range(0, walk.queries, walk.m):
        rows, seen = min(walk.m, walk.queries - first), walk.key_tiles(first, 0)
        for key in range(0, walk.keys, walk.n):
            cols = min(walk.n, walk.keys - key)
            hidden = not (key < seen.stop and key + walk.n > seen.start)
            if walk.prefixes is None and hidden:
                continue
            tile = Tiles(walk.batch * walk.heads, rows, cols, 1, rows * cols)
            each = _model(walk, "teacher", tile, tile, _group(walk)) + _model(walk, "student", tile, tile)
            each += rows * (_log_sums_of(walk) + _kept(walk)) + 4 + _seen(walk, tile)
            read += tile.blocks * each
            products += tile.blocks * 2 * walk.m * walk.n * _widths(walk)
    return Cost(read, _bytes(walk, "d_bias"), once(launch), products, _others(walk, products))


def _bytes(walk: Walk, name: str) -> int:
    x: Any = walk.given[name]
    x = getattr(x, "data", x) if isinstance(x, tuple) else x
    return int(x.numel() * x.element_size())


def _others(walk: Walk, products: float) -> float:
    """Some ten operations of a pair for the student and for every teacher head."""
    return products / 2 / _widths(walk) * 10 * (1 + _group(walk))
