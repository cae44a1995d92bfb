"""Tiles that Triton kernels of map distillation work on: how they are described, loaded, masked and written.

Shapes: B batch, H query heads, K keys, Q queries, S places; M queries and N keys of a tile, D head dimension, W the
power of two that holds it. Scores are [M, N], or [N, M] where queries are summed over; `rows` and `cols`, places of
queries and keys, are [M, 1] and [1, N], or [1, M] and [N, 1].
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from headway.kernels.triton.numbers import operand


class Heads(NamedTuple):
    """A tensor [B, H, S, D] whose last stride is 1: data and the other strides."""

    data: Any
    batch: int
    head: int
    place: int


class Biases(NamedTuple):
    """What is added to scores: a tensor [H, Q, K] with its strides, or slopes [H] with the places; None: nothing."""

    dense: Any
    head: int
    query: int
    key: int
    slopes: Any
    query_places: Any
    key_places: Any


class Model(NamedTuple):
    """Teacher or student; `group`: query heads that read a key head."""

    q: Heads
    k: Heads
    bias: Biases
    scale: float
    group: int


class Seen(NamedTuple):
    """A mask; None: no such condition.

    Attributes:
        counts: uint8 [B, Q], 0 for rows that do not count: they see nothing.
        documents, key_documents: int32 [B, Q] and [B, K]; only keys of a query's document are seen.
        prefix: int32 [B]; keys before it are seen in spite of causality.
        window: width; only keys less than so many places away are seen.
        allowed: uint8 [B, Q, K] with its strides, 0 where a key is not seen.
    """

    counts: Any
    documents: Any
    key_documents: Any
    prefix: Any
    window: int | None
    allowed: Any
    allowed_batch: int
    allowed_query: int
    allowed_key: int


class Sizes(NamedTuple):
    """How many there are; `heads`: of the student."""

    batch: int
    heads: int
    queries: int
    keys: int


# -- tiles ---------------------------------------------------------------------------------------------------------


@triton.jit
def place_of(heads, length, BLOCK: tl.constexpr):
    """Sample, head and first place of this program's block. One number has all, as only a grid's first axis is long."""
    blocks = tl.cdiv(length, BLOCK)
    program = tl.program_id(0)
    sample_head = program // blocks
    return sample_head // heads, sample_head % heads, program % blocks * BLOCK


@triton.jit
def start_of(x, b, head, first):
    """Where row `first` of x[b, head] is. Offsets in a whole tensor need 64 bits, those inside a tile do not."""
    return x.data + wide(b) * x.batch + wide(head) * x.head + wide(first) * x.place


@triton.jit
def wide(number):
    """In 64 bits; interpreted, a loop's number is Python's."""
    return tl.cast(number, tl.int64)


@triton.jit
def tile(x, b, head, first, length, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """N rows of x[b, head] from `first` on, zeros beyond the ends, [N, W]."""
    return chunk(x, b, head, first, length, 0, N, D, W)


@triton.jit
def chunk(x, b, head, first, length, column, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr):
    """C columns of N rows of x[b, head] from `column` and `first` on, zeros beyond the ends, [N, C]."""
    start = start_of(x, b, head, first) + column
    row = tl.arange(0, N)[:, None]
    place = tl.arange(0, C)[None, :]
    inside = row < length - first
    if D % C != 0:
        inside = inside & (place < D - column)
    return tl.load(start + row * x.place + place, mask=inside, other=0.0)


@triton.jit
def held(x, b, head, first, length, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr, C: tl.constexpr):
    """A tile as an operand for `product`; None if that loads C of W columns at once."""
    found = None
    if C == W:
        found = operand(tile(x, b, head, first, length, N, D, W))
    return found


@triton.jit
def product(
    left, right, x, head, first, length, y, y_head, y_first, y_length, b,
    M: tl.constexpr, N: tl.constexpr, D: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """left right^T, tiles of x[b, head] and y[b, y_head], [M, N]; if `left` is None, C of their columns at once: a
    thread keeps whole rows of fp32 operands, for which wide heads leave no registers."""
    if left is None:
        found = tl.zeros([M, N], tl.float32)
        for column in range(0, D, C):
            some = operand(chunk(x, b, head, first, length, column, M, D, C))
            others = operand(chunk(y, b, y_head, y_first, y_length, column, N, D, C))
            found = tl.dot(some, tl.trans(others), found, input_precision="ieee")
    else:
        found = tl.dot(left, tl.trans(right), input_precision="ieee")
    return found


@triton.jit
def aligned(x, BY: tl.constexpr):
    """`x`, whose strides are multiples of BY: compilers are told so of 16 alone, and load less than 16 bytes at once
    where rows are multiples of 8 numbers."""
    return Heads(x.data, x.batch // BY * BY, x.head // BY * BY, x.place // BY * BY)


@triton.jit
def aligned_model(model, BY: tl.constexpr):
    """`aligned` queries and keys."""
    return Model(aligned(model.q, BY), aligned(model.k, BY), model.bias, model.scale, model.group)


@triton.jit
def put(x, b, head, first, length, value, N: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Writes what `tile` reads."""
    start = start_of(x, b, head, first)
    place = tl.arange(0, N)[:, None]
    column = tl.arange(0, W)[None, :]
    inside = (place < length - first) & (column < D)
    tl.store(start + place * x.place + column, value.to(x.data.dtype.element_ty), mask=inside)


@triton.jit
def scores(products, model, head, rows, cols, sizes):
    """scale q k^T + bias, fp32, from the products. Places beyond the ends give something finite."""
    found = products * model.scale
    bias = model.bias
    if bias.dense is not None:
        start = bias.dense + wide(head) * bias.head
        where = wide(rows) * bias.query + wide(cols) * bias.key
        inside = (rows < sizes.queries) & (cols < sizes.keys)
        found += tl.load(start + where, mask=inside, other=0.0).to(tl.float32)
    if bias.slopes is not None:
        query_place = tl.load(bias.query_places + rows, mask=rows < sizes.queries, other=0)
        key_place = tl.load(bias.key_places + cols, mask=cols < sizes.keys, other=0)
        found -= tl.load(bias.slopes + head).to(tl.float32) * tl.abs(key_place - query_place).to(tl.float32)
    return found


@triton.jit
def sees(seen, b, rows, cols, sizes, CAUSAL: tl.constexpr):
    """Whether a query that counts sees a key; false beyond the ends."""
    inside = (rows < sizes.queries) & (cols < sizes.keys)
    ok = inside
    if seen.counts is not None:
        ok = ok & (tl.load(seen.counts + b * sizes.queries + rows, mask=rows < sizes.queries, other=0) != 0)
    if CAUSAL:
        past = cols <= rows
        if seen.prefix is not None:
            past = past | (cols < tl.load(seen.prefix + b))
        ok = ok & past
    if seen.window is not None:
        ok = ok & (tl.abs(rows - cols) < seen.window)
    if seen.documents is not None:
        own = tl.load(seen.documents + b * sizes.queries + rows, mask=rows < sizes.queries, other=0)
        theirs = tl.load(seen.key_documents + b * sizes.keys + cols, mask=cols < sizes.keys, other=0)
        ok = ok & (own == theirs)
    if seen.allowed is not None:
        start = seen.allowed + wide(b) * seen.allowed_batch
        where = wide(rows) * seen.allowed_query + wide(cols) * seen.allowed_key
        ok = ok & (tl.load(start + where, mask=inside, other=0) != 0)
    return ok


@triton.jit
def key_range(seen, b, first, sizes, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """From which key to which M queries from `first` on may see by their places; the first is a multiple of N."""
    start = 0
    stop = sizes.keys
    if CAUSAL:
        stop = tl.minimum(stop, first + M)
        if seen.prefix is not None:
            stop = tl.maximum(stop, tl.minimum(sizes.keys, tl.load(seen.prefix + b)))
    if seen.window is not None:
        start = tl.maximum(0, first - seen.window + 1) // N * N
        stop = tl.minimum(stop, first + M + seen.window - 1)
    return start, stop


@triton.jit
def query_range(seen, b, first, sizes, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """From which query to which N keys from `first` on may be seen by their places; the first is a multiple of M."""
    start = 0
    stop = sizes.queries
    if CAUSAL:
        start = first
        if seen.prefix is not None:
            start = tl.where(first < tl.load(seen.prefix + b), 0, first)
    if seen.window is not None:
        start = tl.maximum(start, first - seen.window + 1)
        stop = tl.minimum(stop, first + N + seen.window - 1)
    return start // M * M, stop


@triton.jit
def row(data, b, heads, head, rows, sizes):
    """Something of every row, [B, heads, Q], of some rows; 0 beyond the end."""
    start = data + wide(b * heads + head) * sizes.queries
    return tl.load(start + rows, mask=rows < sizes.queries, other=0.0)


@triton.jit
def put_row(data, b, heads, head, rows, sizes, value):
    """Writes what `row` reads; `rows` is one-dimensional."""
    start = data + wide(b * heads + head) * sizes.queries
    tl.store(start + rows, value, mask=rows < sizes.queries)
