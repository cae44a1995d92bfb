"""Triton kernels of gated linear attention: `gated_linear` has the mathematics.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chunks, C tokens of a chunk, X
dimensions of keys and Z of values. A line is a query head of a sample; states are [lines, N, D, D], totals fp32
[lines, S, D], weights [lines, S, C].
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.triton.map_tiles import wide
from headway.kernels.triton.numbers import as_operand
from headway.kernels.triton.state_tiles import (
    border,
    chunk_of,
    last_of,
    of_rows,
    part,
    products_of,
    put_products,
    put_rows,
    put_state,
    state_of,
    through,
    within,
)


@triton.jit
def gated_linear_totals_kernel(logs, totals, length, keys, X: tl.constexpr, C: tl.constexpr):
    """A program: X dimensions of a chunk."""
    line, first, column = chunk_of(length, keys, C, X)
    found = tl.cumsum(of_rows(logs, line, first, length, column, keys, C, X), 0)
    put_rows(totals, line, first, length, column, keys, found, C, X)


@triton.jit
def gated_linear_states_kernel(
    x, y, totals, documents, states, scale, heads, group, length, keys, values,
    BACK: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: X x Z numbers of a head's state, chunk by chunk; `BACK`: from the right, x being queries."""
    columns = tl.cdiv(values, Z)
    blocks = tl.cdiv(keys, X) * columns
    line = tl.program_id(0) // blocks
    b = line // heads
    head = line % heads
    x_head = head if BACK else head // group
    y_head = head if BACK else head // group
    tile = tl.program_id(0) % blocks
    row = tile // columns * X
    column = tile % columns * Z
    state = tl.zeros([X, Z], tl.float32)
    chunks = tl.cdiv(length, C)
    for step in range(chunks):
        n = step
        if BACK:
            n = chunks - 1 - step
        first = n * C
        put_state(states, wide(line) * chunks + n, keys, values, row, column, state, X, Z)
        total = of_rows(totals, line, first, length, row, keys, C, X)
        end = _totals_at(totals, line, last_of(first, length, C), length, row, keys, X)
        state *= (tl.exp(end) * through(None, documents, b, line, first, length, C))[:, None]
        gives = border(None, documents, b, line, first, length, not BACK, C)
        if BACK:
            factor = tl.exp(total) * scale
        else:
            factor = tl.exp(end[None, :] - total)
        given = part(x, b, x_head, first, length, row, keys, C, X).to(tl.float32) * factor * gives[:, None]
        others = part(y, b, y_head, first, length, column, values, C, Z)
        state = tl.dot(
            tl.trans(as_operand(given, y.data.dtype.element_ty)), others, state, input_precision="ieee"
        )


@triton.jit
def gated_linear_weights_kernel(
    q, k, totals, documents, weights, scale, heads, group, length, keys,
    LEVELS: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: scale sum_d q_td k_jd exp(total_td - total_jd) of a chunk, 0 where t sees j not."""
    line, first, _ = chunk_of(length, 1, C, 1)
    b = line // heads
    head = line % heads
    place = tl.arange(0, C)
    products = tl.zeros([C, C], tl.float32)
    own = tl.zeros([C], tl.float32)
    like = q.data.dtype.element_ty
    for column in range(0, keys, X):
        queries = part(q, b, head, first, length, column, keys, C, X).to(tl.float32)
        key = part(k, b, head // group, first, length, column, keys, C, X).to(tl.float32)
        total = of_rows(totals, line, first, length, column, keys, C, X)
        own += tl.sum(queries * key, 1)
        for level in range(LEVELS):
            late, decayed = _halved(totals, total, line, first, length, column, keys, level, C, X)
            left = as_operand(tl.where(late[:, None], queries * decayed, 0.0), like)
            right = as_operand(tl.where(late[:, None], 0.0, key * decayed), like)
            found = tl.dot(left, tl.trans(right), input_precision="ieee")
            products += tl.where(_paired(level, C), found, 0.0)
    products += tl.where(place[:, None] == place[None, :], own[:, None], 0.0)
    products *= within(None, documents, b, line, first, length, False, C) * scale
    put_products(weights, line, first, length, products, C)


@triton.jit
def gated_linear_outputs_kernel(
    a, y, totals, documents, weights, states, result, scale, heads, group, length, keys, values,
    BACK: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: Z columns of a chunk's outputs, a being queries and y values; `BACK`: of gradients of values, a being
    keys and y gradients of outputs."""
    line, first, column = chunk_of(length, values, C, Z)
    b = line // heads
    head = line % heads
    number = wide(line) * tl.cdiv(length, C) + first // C
    like = y.data.dtype.element_ty
    reads = border(None, documents, b, line, first, length, BACK, C)[:, None]
    a_head = head // group if BACK else head
    y_head = head if BACK else head // group
    found = tl.zeros([C, Z], tl.float32)
    for x in range(0, keys, X):
        total = of_rows(totals, line, first, length, x, keys, C, X)
        if BACK:
            factor = tl.exp(
                _totals_at(totals, line, last_of(first, length, C), length, x, keys, X)[None, :] - total
            )
        else:
            factor = tl.exp(total) * scale
        left = part(a, b, a_head, first, length, x, keys, C, X).to(tl.float32) * factor * reads
        state = state_of(states, number, keys, values, x, column, False, X, Z)
        found = tl.dot(as_operand(left, like), as_operand(state, like), found, input_precision="ieee")
    products = as_operand(products_of(weights, line, first, length, BACK, C), like)
    others = part(y, b, y_head, first, length, column, values, C, Z)
    found = tl.dot(products, others, found, input_precision="ieee")
    put_rows(result, line, first, length, column, values, found, C, Z)


@triton.jit
def gated_linear_gradients_kernel(
    q, k, v, d, totals, documents, states, d_states, dq, dk, d_logs, scale, heads, group, length, keys, values,
    LEVELS: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: X dimensions of a chunk's queries, keys and gates."""
    line, first, column = chunk_of(length, keys, C, X)
    b = line // heads
    head = line % heads
    number = wide(line) * tl.cdiv(length, C) + first // C
    like = q.data.dtype.element_ty
    slopes = tl.zeros([C, C], tl.float32)
    asked = tl.zeros([C, X], tl.float32)
    handed = tl.zeros([C, X], tl.float32)
    passed = tl.zeros([X], tl.float32)
    for z in range(0, values, Z):
        slope = part(d, b, head, first, length, z, values, C, Z)
        value = part(v, b, head // group, first, length, z, values, C, Z)
        slopes = tl.dot(slope, tl.trans(value), slopes, input_precision="ieee")
        state = state_of(states, number, keys, values, z, column, True, Z, X)
        asked = tl.dot(slope, as_operand(state, like), asked, input_precision="ieee")
        d_state = state_of(d_states, number, keys, values, z, column, True, Z, X)
        handed = tl.dot(value, as_operand(d_state, like), handed, input_precision="ieee")
        passed += tl.sum(state * d_state, 0)
    slopes *= within(None, documents, b, line, first, length, False, C) * scale
    total = of_rows(totals, line, first, length, column, keys, C, X)
    end = _totals_at(totals, line, last_of(first, length, C), length, column, keys, X)
    passed *= tl.exp(end) * through(None, documents, b, line, first, length, C)
    asked *= tl.exp(total) * (border(None, documents, b, line, first, length, False, C) * scale)[:, None]
    handed *= tl.exp(end[None, :] - total) * border(None, documents, b, line, first, length, True, C)[:, None]
    queries = part(q, b, head, first, length, column, keys, C, X).to(tl.float32)
    key = part(k, b, head // group, first, length, column, keys, C, X).to(tl.float32)
    passed += tl.sum(key * handed, 0)
    place = tl.arange(0, C)
    own = tl.sum(tl.where(place[:, None] == place[None, :], slopes, 0.0), 1)[:, None]
    asked += own * key
    handed += own * queries
    for level in range(LEVELS):
        late, decayed = _halved(totals, total, line, first, length, column, keys, level, C, X)
        corner = as_operand(tl.where(_paired(level, C) & late[:, None] & ~late[None, :], slopes, 0.0), like)
        early = as_operand(tl.where(late[:, None], 0.0, key * decayed), like)
        asked += tl.dot(corner, early, input_precision="ieee") * decayed
        later = as_operand(tl.where(late[:, None], queries * decayed, 0.0), like)
        handed += tl.dot(tl.trans(corner), later, input_precision="ieee") * decayed
    put_rows(dq, line, first, length, column, keys, asked, C, X)
    put_rows(dk, line, first, length, column, keys, handed, C, X)
    found = tl.cumsum(queries * asked - key * handed, 0, reverse=True) + passed[None, :]
    put_rows(d_logs, line, first, length, column, keys, found, C, X)


# -- tiles ---------------------------------------------------------------------------------------------------------


@triton.jit
def _totals_at(totals, line, token, length, column, width, W: tl.constexpr):
    """Of one token, [W]."""
    place = column + tl.arange(0, W)
    return tl.load(totals + (wide(line) * length + token) * width + place, mask=place < width, other=0.0)


@triton.jit
def _halved(totals, total, line, first, length, column, width, level, C: tl.constexpr, W: tl.constexpr):
    """Which tokens are in second halves of size 2^level, and decays between them and their pair's border, [C, W]: of
    second halves from it on, of first ones up to it. Exponents above 0 are of what lies beyond the end alone."""
    size = 1 << level
    row = tl.arange(0, C)
    late = row // size % 2 == 1
    between = (row // (2 * size) * (2 * size) + size - 1)[:, None]
    place = column + tl.arange(0, W)[None, :]
    inside = (between < length - first) & (place < width)
    start = totals + (wide(line) * length + first) * width
    at = tl.load(start + between * width + place, mask=inside, other=0.0)
    exponent = tl.where(late[:, None], total - at, at - total)
    return late, tl.exp(tl.minimum(exponent, 0.0))


@triton.jit
def _paired(level, C: tl.constexpr):
    """Whether two tokens are of one pair of halves of size 2^level, [C, C]."""
    pair = tl.arange(0, C) // (2 << level)
    return pair[:, None] == pair[None, :]
