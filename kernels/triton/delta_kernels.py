"""Triton kernels of the gated delta rule: `delta_rule` has the mathematics.

Shapes: B batch, H heads, S tokens, D head dimension, N chunks, C tokens of a chunk, X dimensions of keys and Z of
values. A line is a head of a sample; states are [lines, N, D, D], T and weights [lines, S, C].
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
    of_rows,
    of_tokens,
    part,
    products_of,
    put_products,
    put_rows,
    put_state,
    put_tokens,
    state_of,
    through,
    within,
)


@triton.jit
def _steps(log, line, first, length, C: tl.constexpr):
    """Logarithms of a, [C], 0 beyond the end, and at [t, j] that of t where t is after j. Decays between two tokens are
    their sums: differences of sums from the chunk's start would keep few digits after a token that forgets all."""
    own = of_tokens(log, line, first, length, C)
    place = tl.arange(0, C)
    return own, tl.where(place[:, None] > place[None, :], own[:, None], 0.0)


@triton.jit
def _edges(log, documents, b, line, first, length, C: tl.constexpr):
    """Factors of a state as it comes to each token, of each token as the chunk is left, [C], and through it."""
    own, steps = _steps(log, line, first, length, C)
    enter = tl.exp(tl.cumsum(own, 0)) * border(None, documents, b, line, first, length, False, C)
    leave = tl.exp(tl.sum(steps, 0)) * border(None, documents, b, line, first, length, True, C)
    return enter, leave, tl.exp(tl.sum(own, 0)) * through(None, documents, b, line, first, length, C)


@triton.jit
def _decays(log, documents, b, line, first, length, C: tl.constexpr):
    """Of each token between it and an earlier one, [C, C]; 0 where it sees it not."""
    _, steps = _steps(log, line, first, length, C)
    return tl.exp(tl.cumsum(steps, 0)) * within(None, documents, b, line, first, length, False, C)


@triton.jit
def _inverse(below, PRECISION: tl.constexpr, LEVELS: tl.constexpr, C: tl.constexpr):
    """Of 1 + `below`, strictly lower triangular."""
    place = tl.arange(0, C)
    found = tl.where(place[:, None] == place[None, :], 1.0, 0.0)
    for level in range(LEVELS):
        late = place // (1 << level) % 2 == 1
        pair = place // (2 << level)
        corner = (pair[:, None] == pair[None, :]) & late[:, None] & ~late[None, :]
        right = tl.dot(tl.where(corner, below, 0.0), found, input_precision=PRECISION)
        found -= tl.dot(found, right, input_precision=PRECISION)
    return found


@triton.jit
def _by_parts(key, state, W: tl.constexpr):
    """key @ state, summed over W dimensions at once and then over the parts: vector units, which multiply fp32 on
    NVIDIA's GPUs, keep what is summed at once in registers."""
    C: tl.constexpr = key.shape[0]
    X: tl.constexpr = key.shape[1]
    if W == X:
        return tl.dot(key, state, input_precision="ieee")
    left = tl.permute(tl.reshape(tl.trans(key), [X // W, W, C]), (0, 2, 1))
    right = tl.reshape(state, [X // W, W, state.shape[1]])
    return tl.sum(tl.dot(left, right, input_precision="ieee"), 0)


@triton.jit
def delta_rule_systems_kernel(
    q, k, beta, log, documents, inverse, weights, heads, length, keys,
    LEVELS: tl.constexpr, X: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: T and weights of a chunk."""
    line, first, _ = chunk_of(length, 1, C, 1)
    b = line // heads
    head = line % heads
    place = tl.arange(0, C)
    overlaps = tl.zeros([C, C], tl.float32)
    products = tl.zeros([C, C], tl.float32)
    for x in range(0, keys, X):
        key = part(k, b, head, first, length, x, keys, C, X)
        overlaps = tl.dot(key, tl.trans(key), overlaps, input_precision="ieee")
        query = part(q, b, head, first, length, x, keys, C, X)
        products = tl.dot(query, tl.trans(key), products, input_precision="ieee")
    decays = _decays(log, documents, b, line, first, length, C)
    put_products(weights, line, first, length, products * decays, C)
    below = tl.where(place[:, None] > place[None, :], overlaps * decays, 0.0)
    below *= of_tokens(beta, line, first, length, C)[:, None]
    # Of 16 bits T is rounded to more coarsely than tf32 rounds its factors.
    PRECISION: tl.constexpr = "ieee" if q.data.dtype.element_ty == tl.float32 else "tf32"
    put_products(inverse, line, first, length, _inverse(below, PRECISION, LEVELS, C), C)


@triton.jit
def delta_rule_states_kernel(
    k, v, beta, log, documents, inverse, states, written, heads, length, keys, values,
    X: tl.constexpr, Z: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: Z columns of a head's state, chunk by chunk."""
    blocks = tl.cdiv(values, Z)
    line = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * Z
    b = line // heads
    head = line % heads
    like = v.data.dtype.element_ty
    chunks = tl.cdiv(length, C)
    state = tl.zeros([X, Z], tl.float32)
    for n in range(chunks):
        first = n * C
        put_state(states, wide(line) * chunks + n, keys, values, 0, column, state, X, Z)
        enter, leave, kept = _edges(log, documents, b, line, first, length, C)
        key = part(k, b, head, first, length, 0, keys, C, X)
        found = _by_parts(key, as_operand(state, like), W)
        right = part(v, b, head, first, length, column, values, C, Z).to(tl.float32) - enter[:, None] * found
        right *= of_tokens(beta, line, first, length, C)[:, None]
        solver = as_operand(products_of(inverse, line, first, length, False, C), like)
        writes = tl.dot(solver, as_operand(right, like), input_precision="ieee")
        put_rows(written, line, first, length, column, values, writes, C, Z)
        left = as_operand(writes * leave[:, None], like)
        state = tl.dot(tl.trans(key), left, state * kept, input_precision="ieee")


@triton.jit
def delta_rule_outputs_kernel(
    q, log, documents, weights, states, written, out, heads, length, keys, values,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: Z columns of a chunk's outputs."""
    line, first, column = chunk_of(length, values, C, Z)
    b = line // heads
    head = line % heads
    like = out.dtype.element_ty
    number = wide(line) * tl.cdiv(length, C) + first // C
    found = tl.zeros([C, Z], tl.float32)
    for x in range(0, keys, X):
        state = as_operand(state_of(states, number, keys, values, x, column, False, X, Z), like)
        found = tl.dot(part(q, b, head, first, length, x, keys, C, X), state, found, input_precision="ieee")
    enter, _, _ = _edges(log, documents, b, line, first, length, C)
    products = as_operand(products_of(weights, line, first, length, False, C), like)
    others = part(written, b, head, first, length, column, values, C, Z)
    found = tl.dot(products, others, found * enter[:, None], input_precision="ieee")
    put_rows(out, line, first, length, column, values, found, C, Z)


@triton.jit
def delta_rule_back_kernel(
    q, k, d, beta, log, documents, inverse, weights, d_states, d_right, heads, length, keys, values,
    X: tl.constexpr, Z: tl.constexpr, W: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: Z columns of gradients of a head's state, from the last chunk to the first."""
    blocks = tl.cdiv(values, Z)
    line = tl.program_id(0) // blocks
    column = tl.program_id(0) % blocks * Z
    b = line // heads
    head = line % heads
    like = d_right.dtype.element_ty
    chunks = tl.cdiv(length, C)
    d_state = tl.zeros([X, Z], tl.float32)
    for step in range(chunks):
        n = chunks - 1 - step
        first = n * C
        put_state(d_states, wide(line) * chunks + n, keys, values, 0, column, d_state, X, Z)
        enter, leave, kept = _edges(log, documents, b, line, first, length, C)
        key = part(k, b, head, first, length, 0, keys, C, X)
        slope = part(d, b, head, first, length, column, values, C, Z)
        products = as_operand(products_of(weights, line, first, length, True, C), like)
        d_written = _by_parts(key, as_operand(d_state, like), W) * leave[:, None]
        d_written = tl.dot(products, slope, d_written, input_precision="ieee")
        solver = as_operand(products_of(inverse, line, first, length, True, C), like)
        found = tl.dot(solver, as_operand(d_written, like), input_precision="ieee")
        put_rows(d_right, line, first, length, column, values, found, C, Z)
        took = as_operand(found * -(enter * of_tokens(beta, line, first, length, C))[:, None], like)
        d_state = tl.dot(tl.trans(key), took, d_state * kept, input_precision="ieee")
        asked = as_operand(slope.to(tl.float32) * enter[:, None], like)
        query = part(q, b, head, first, length, 0, keys, C, X)
        d_state = tl.dot(tl.trans(query), asked, d_state, input_precision="ieee")


@triton.jit
def delta_rule_gradients_kernel(
    q, k, v, d, beta, log, documents, weights, states, written, d_states, d_right, dq, dk, dv, d_beta, d_log,
    heads, length, keys, values, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: gradients of a chunk."""
    line, first, _ = chunk_of(length, 1, C, 1)
    b = line // heads
    head = line % heads
    like = dq.dtype.element_ty
    number = wide(line) * tl.cdiv(length, C) + first // C
    row = tl.arange(0, C)
    fraction = of_tokens(beta, line, first, length, C)
    enter, leave, kept = _edges(log, documents, b, line, first, length, C)
    d_fraction = tl.zeros([C], tl.float32)
    d_system = tl.zeros([C, C], tl.float32)
    slopes = tl.zeros([C, C], tl.float32)
    for z in range(0, values, Z):
        wrote = as_operand(of_rows(written, line, first, length, z, values, C, Z), like)
        right = as_operand(of_rows(d_right, line, first, length, z, values, C, Z), like)
        d_system = tl.dot(right, tl.trans(wrote), d_system, input_precision="ieee")
        slope = part(d, b, head, first, length, z, values, C, Z)
        slopes = tl.dot(slope, tl.trans(wrote), slopes, input_precision="ieee")
        wanted = right.to(tl.float32)
        d_fraction += tl.sum(wanted * part(v, b, head, first, length, z, values, C, Z).to(tl.float32), 1)
        put_rows(dv, line, first, length, z, values, wanted * fraction[:, None], C, Z)
    overlaps = tl.zeros([C, C], tl.float32)
    for x in range(0, keys, X):
        key = part(k, b, head, first, length, x, keys, C, X)
        overlaps = tl.dot(key, tl.trans(key), overlaps, input_precision="ieee")
    decays = _decays(log, documents, b, line, first, length, C)
    earlier = row[:, None] > row[None, :]
    overlaps = tl.where(earlier, overlaps * decays, 0.0)
    d_system = tl.where(earlier, -d_system, 0.0)
    d_fraction += tl.sum(d_system * overlaps, 1)
    d_system *= fraction[:, None]
    d_between = d_system * overlaps + slopes * products_of(weights, line, first, length, False, C)
    d_system *= decays
    by_keys = as_operand(d_system + tl.trans(d_system), like)
    by_queries = as_operand(slopes * decays, like)
    d_total = tl.zeros([C], tl.float32)
    d_leave = tl.zeros([C], tl.float32)
    passed = tl.zeros([X], tl.float32)
    for x in range(0, keys, X):
        asked = tl.zeros([C, X], tl.float32)
        handed = tl.zeros([C, X], tl.float32)
        took = tl.zeros([C, X], tl.float32)
        for z in range(0, values, Z):
            state = state_of(states, number, keys, values, z, x, True, Z, X)
            d_state = state_of(d_states, number, keys, values, z, x, True, Z, X)
            passed += tl.sum(state * d_state, 0)
            wrote = as_operand(of_rows(written, line, first, length, z, values, C, Z), like)
            right = as_operand(of_rows(d_right, line, first, length, z, values, C, Z), like)
            slope = part(d, b, head, first, length, z, values, C, Z)
            state = as_operand(state, like)
            asked = tl.dot(slope, state, asked, input_precision="ieee")
            took = tl.dot(right, state, took, input_precision="ieee")
            handed = tl.dot(wrote, as_operand(d_state, like), handed, input_precision="ieee")
        query = part(q, b, head, first, length, x, keys, C, X)
        key = part(k, b, head, first, length, x, keys, C, X)
        asked *= enter[:, None]
        took *= enter[:, None]
        handed *= leave[:, None]
        taken = tl.sum(took * key.to(tl.float32), 1)
        d_fraction -= taken
        d_total += tl.sum(asked * query.to(tl.float32), 1) - taken * fraction
        d_leave += tl.sum(handed * key.to(tl.float32), 1)
        asked = tl.dot(by_queries, key, asked, input_precision="ieee")
        handed = tl.dot(by_keys, key, handed - took * fraction[:, None], input_precision="ieee")
        handed = tl.dot(tl.trans(by_queries), query, handed, input_precision="ieee")
        put_rows(dq, line, first, length, x, keys, asked, C, X)
        put_rows(dk, line, first, length, x, keys, handed, C, X)
    put_tokens(d_beta, line, first, length, d_fraction, C)
    # A logarithm is in all decays between a token before it and one from it on, and in those from it to the end.
    d_between += tl.where(row[:, None] == C - 1, d_leave[None, :], 0.0)
    d_own = tl.sum(tl.where(earlier, tl.cumsum(d_between, 0, reverse=True), 0.0), 1)
    d_own += tl.cumsum(d_total, 0, reverse=True) + tl.sum(passed, 0) * kept
    put_tokens(d_log, line, first, length, d_own, C)
