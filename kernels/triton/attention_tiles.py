"""Tiles of attention in Triton kernels: scores with caps and biases, dropout of weights, and gradients of scores.

Shapes: M queries and N keys of a tile. Scores are [M, N], or [N, M] where queries are summed over; `rows` and `cols`,
places of queries and keys, are [M, 1] and [1, N], or [1, M] and [N, 1].
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from headway.kernels.triton import philox
from headway.kernels.triton.map_tiles import key_range, query_range, sees, wide


class Dropped(NamedTuple):
    """Dropout of weights; see `attention.dense.WeightDropout`.

    Attributes:
        key: int64, 0-dim.
        least: `random.threshold(p)`.
        factor: of weights that are kept.
        slots, positions: int64 [B] and [Q].
        first_head, first_key: of what is here; the latter a multiple of 8.
    """

    key: Any
    least: int
    factor: float
    slots: Any
    positions: Any
    first_head: int
    first_key: int


class Spans(NamedTuple):
    """The first and the last key of every query's document, int32 [B, Q], and the same of a key's queries, [B, K]: an
    end before the beginning where there is none."""

    first_key: Any
    last_key: Any
    first_query: Any
    last_query: Any


@triton.jit
def keys_seen(seen, spans, b, first, sizes, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """`map_tiles.key_range`, narrowed to documents."""
    start, stop = key_range(seen, b, first, sizes, CAUSAL, M, N)
    if spans is not None:
        least, most = _span(spans.first_key, spans.last_key, b, first, sizes.queries, sizes.keys, M)
        start = tl.maximum(start, least // N * N)
        stop = tl.minimum(stop, most + 1)
    return start, stop


@triton.jit
def queries_seen(seen, spans, b, first, sizes, CAUSAL: tl.constexpr, M: tl.constexpr, N: tl.constexpr):
    """`map_tiles.query_range`, narrowed to documents."""
    start, stop = query_range(seen, b, first, sizes, CAUSAL, M, N)
    if spans is not None:
        least, most = _span(spans.first_query, spans.last_query, b, first, sizes.keys, sizes.queries, N)
        start = tl.maximum(start, least // M * M)
        stop = tl.minimum(stop, most + 1)
    return start, stop


@triton.jit
def _span(firsts, lasts, b, first, length, others, BLOCK: tl.constexpr):
    """The least and the most of a block's spans."""
    place = first + tl.arange(0, BLOCK)
    start = wide(b) * length
    least = tl.min(tl.load(firsts + start + place, mask=place < length, other=others), 0)
    most = tl.max(tl.load(lasts + start + place, mask=place < length, other=-1), 0)
    return least, most


@triton.jit
def tanh(x):
    """By e^-2|x|, which never overflows; to 2^-23 of 1."""
    power = tl.exp(-2 * tl.abs(x))
    size = (1 - power) / (1 + power)
    return tl.where(x < 0, -size, size)


@triton.jit
def capped_scores(left, right, model, cap, head, rows, cols, sizes):
    """cap tanh(scale left right^T / cap) + bias in fp32, and the tanh. Places beyond the ends give something finite."""
    found = tl.dot(left, tl.trans(right), input_precision="ieee") * model.scale
    bent = found
    if cap is not None:
        bent = tanh(found / cap)
        found = bent * cap
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
    return found, bent


@triton.jit
def kept(drop, b, head, query, key, sizes, M: tl.constexpr, N: tl.constexpr):
    """Which weights of M queries from `query` on and N keys from `key` on are kept, [M, N]."""
    rows = query + tl.arange(0, M)
    position = tl.load(drop.positions + rows, mask=rows < sizes.queries, other=0)
    slot = tl.load(drop.slots + b)
    head += drop.first_head
    return philox.keep(tl.load(drop.key), drop.least, slot, head, position, key + drop.first_key, M, N)


@triton.jit
def kept_anew(drop, b, head, query, key, sizes, M: tl.constexpr, N: tl.constexpr):
    """`kept`, where registers are few: the key is loaded for every tile, else the keys of ten rounds stay in them."""
    rows = query + tl.arange(0, M)
    position = tl.load(drop.positions + rows, mask=rows < sizes.queries, other=0)
    slot = tl.load(drop.slots + b)
    head += drop.first_head
    random_key = tl.load(drop.key, volatile=True)
    return philox.keep(random_key, drop.least, slot, head, position, key + drop.first_key, M, N)


@triton.jit
def _along(x, LAST: tl.constexpr):
    """A vector along the last or the first dim of a tile."""
    if LAST:
        found = x[None, :]
    else:
        found = x[:, None]
    return found


@triton.jit
def pulled(
    left, right, d_left, d_right, lse, delta, model, cap, seen, drop, sizes, b, head, query, key,
    CAUSAL: tl.constexpr, TURNED: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Weights as values met them, and the gradients of scores and of products (before cap and bias), without `scale`.

    `left`, `right`: tiles of queries and keys; `d_left`, `d_right`: of the output's gradient and values; if `TURNED`
    keys (and values) come first, and what is found is [N, M]; without
    `d_left`, weights alone are found. `lse`, `delta`: of the queries, [M].
    """
    rows = _along(query + tl.arange(0, M), TURNED)
    cols = _along(key + tl.arange(0, N), not TURNED)
    s, bent = capped_scores(left, right, model, cap, head, rows, cols, sizes)
    ok = sees(seen, b, rows, cols, sizes, CAUSAL)
    weights = tl.exp(tl.where(ok, s - _along(lse, TURNED), float("-inf")))
    used = weights
    if drop is not None:
        stays = kept(drop, b, head, query, key, sizes, M, N)
        if TURNED:
            stays = tl.trans(stays)
        used = tl.where(stays, weights * drop.factor, 0.0)
    d_scores = weights
    d_products = weights
    if d_left is not None:
        d_weights = tl.dot(d_left, tl.trans(d_right), input_precision="ieee")
        d_scores = used * d_weights - weights * _along(delta, TURNED)  # p (m dp - delta), without m once more
        d_products = d_scores
        if cap is not None:
            d_products = d_scores * (1 - bent * bent)
    return used, d_scores, d_products
