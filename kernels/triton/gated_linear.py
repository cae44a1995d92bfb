"""Gated linear attention, S_t = diag(a_t) S_{t-1} + k_t v_t^T and o_t = q_t^T S_t: `kernels.attention.linear.gated`.

As there, a chunk is halved again and again: keys of first halves meet queries of second ones by way of the border
between them, so that no exponent is above 0. All pairs of halves of a size are one product of whole tiles, of which
those of other pairs are dropped: six products of tensor cores, where PyTorch's version copies corners, and where blocks
on the diagonal would need the vector units (Yang et al. 2024a, section 4.3).

    totals      logarithms of gates summed from each chunk's start
    weights     products inside of chunks, decayed, [B, H, S, C]
    states      walks the chunks; from the right those of the backward
    outputs     weights v + enter q S; of the backward dv = weights^T d + leave k dS
    gradients   dq, dk and those of gates, which are what q dq - k dk sums to (appendix C)

The backward forms weights again: kept, they would be as much as a head of C dimensions. Borders are read for each of
the six sizes, from the cache of a multiprocessor that holds the tile. A program has some columns of its result, and
reads the operands of the chunk's products once for each block of these.

Shapes: B batch, H query heads, K key/value heads, S tokens, D head dimension, N chunks, C tokens of a chunk; in kernels
X dimensions of keys and Z of values.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.dense import score_scale
from headway.kernels.attention.linear.gated import log_decay
from headway.kernels.attention.masks import Mask
from headway.kernels.triton.map_tiles import wide
from headway.kernels.triton.numbers import as_operand, narrowed
from headway.kernels.triton.state_tiles import (
    CHUNK,
    block,
    border,
    check,
    chunk_of,
    documents_of,
    heads_of,
    last_of,
    part,
    products_of,
    put_products,
    rows_of,
    state_at,
    through,
    within,
)
from headway.kernels.triton.tuning import Config, Space


def _tile_configs(target: str, keys: int, values: int) -> list[Config]:
    return [Config({"X": block(keys, x), "Z": block(values, x)}, 4, 2) for x in (64, 32)]


def _gradient_configs(target: str, keys: int, values: int) -> list[Config]:
    warps = 4 if target == "gfx942" else 8  # of 64 lanes there
    return [Config({"X": block(keys, x), "Z": block(values, 32)}, warps, 1) for x in (32, 16)]


def _weight_configs(target: str, keys: int) -> list[Config]:
    return [Config({"X": block(keys, x)}, 4, 1) for x in (64, 32)]


STATES = Space("gated_linear_states", _tile_configs)
OUTPUTS = Space("gated_linear_outputs", _tile_configs)
GRADIENTS = Space("gated_linear_gradients", _gradient_configs)
WEIGHTS = Space("gated_linear_weights", _weight_configs)
TOTALS = Space("gated_linear_totals", _weight_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def gated_linear(
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    scale: float | None = None,
    *,
    decay: Tensor,
) -> Tensor:
    """As `gated.attention`, [B, H, S, D] like v.

    Args:
        mask: causal, with documents or without; a state begins at 0 with each document.
        scale: factor of the queries; 1 / sqrt(D) if None.
        decay: [B, H, S, D], before the sigmoid; PyTorch takes its logarithm.

    Raises:
        KernelUnavailable: a mask or dtypes that it does not take.
    """
    check("gated_linear", mask, q=q_BHSD, k=k_BKSD, v=v_BKSD)
    documents = documents_of(mask, q_BHSD.shape[0])
    logs = log_decay(decay)
    out: Tensor = _GatedLinear.apply(q_BHSD, k_BKSD, v_BKSD, logs, documents, score_scale(scale, q_BHSD))
    return out


class _Call(NamedTuple):
    """What all kernels of a call share; `totals`: fp32 [B, H, S, D]."""

    q: Tensor
    k: Tensor
    v: Tensor
    totals: Tensor
    documents: Tensor | None
    scale: float

    @property
    def widths(self) -> dict[str, int]:
        return {"keys": self.k.shape[3], "values": self.v.shape[3]}

    @property
    def places(self) -> tuple[int, int, int]:
        """Query heads, those that read a key head, tokens."""
        return self.q.shape[1], self.q.shape[1] // self.k.shape[1], self.q.shape[2]

    @property
    def chunks(self) -> int:
        """Of all heads."""
        return self.q.shape[0] * self.q.shape[1] * triton.cdiv(self.q.shape[2], CHUNK)

    def walk(self, y: Tensor, back: bool) -> Tensor:
        """States [B, H, N, D, D] that reach each chunk: of keys and values y, or from the right of queries and y."""
        config = STATES.choose(y.device, **self.widths)
        keys, values = self.widths.values()
        heads, _, length = self.places
        states = y.new_empty(y.shape[0], heads, triton.cdiv(length, CHUNK), keys, values)
        programs = y.shape[0] * heads * _blocks(keys, config, "X") * _blocks(values, config, "Z")
        given = heads_of(self.q if back else self.k), heads_of(y), self.totals, self.documents, states
        gated_linear_states_kernel[programs,](
            *given, self.scale, *self.places, keys, values, BACK=back, C=CHUNK, **config.options
        )
        return states

    def weights(self) -> Tensor:
        """Products inside of chunks, [B, H, S, C]."""
        weights = self.q.new_empty(*self.q.shape[:3], CHUNK)
        config = WEIGHTS.choose(self.q.device, keys=self.k.shape[3])
        gated_linear_weights_kernel[self.chunks,](
            heads_of(self.q), heads_of(self.k), self.totals, self.documents, weights, self.scale, *self.places,
            self.k.shape[3], LEVELS=CHUNK.bit_length() - 1, C=CHUNK, **config.options,
        )  # fmt: skip
        return weights

    def outputs(self, y: Tensor, states: Tensor, back: bool) -> Tensor:
        """Outputs from values y, or gradients of each query head's values from those of outputs."""
        keys, values = self.widths.values()
        result = y.new_empty(*self.q.shape[:3], values)
        config = OUTPUTS.choose(y.device, **self.widths)
        given = heads_of(self.k if back else self.q), heads_of(y), self.totals, self.documents, self.weights()
        gated_linear_outputs_kernel[self.chunks * _blocks(values, config, "Z"),](
            *given, states, result, self.scale, *self.places, keys, values,
            BACK=back, C=CHUNK, **config.options,
        )  # fmt: skip
        return result

    def gradients(self, d: Tensor, states: Tensor, d_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of queries, of each query head's keys, and of logarithms of gates."""
        keys, values = self.widths.values()
        dq, dk = (torch.empty_like(self.q, memory_format=torch.contiguous_format) for _ in range(2))
        d_logs = torch.empty_like(self.totals)
        config = GRADIENTS.choose(d.device, **self.widths)
        given = *map(heads_of, (self.q, self.k, self.v, d)), self.totals, self.documents, states, d_states
        gated_linear_gradients_kernel[self.chunks * _blocks(keys, config, "X"),](
            *given, dq, dk, d_logs, self.scale, *self.places, keys, values,
            LEVELS=CHUNK.bit_length() - 1, C=CHUNK, **config.options,
        )  # fmt: skip
        return dq, dk, d_logs


def _blocks(width: int, config: Config, tile: str) -> int:
    return triton.cdiv(width, config.tiles[tile])


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, logs, documents, scale):
        logs = logs.contiguous()
        totals = torch.empty_like(logs)
        config = TOTALS.choose(q.device, keys=q.shape[3])
        call = _Call(q, k, v, totals, documents, scale)
        with torch.cuda.device_of(q):
            gated_linear_totals_kernel[call.chunks * _blocks(q.shape[3], config, "X"),](
                logs, totals, q.shape[2], q.shape[3], C=CHUNK, **config.options
            )
            states = call.walk(v, False)
            out = call.outputs(v, states, False)
        ctx.save_for_backward(q, k, v, totals, documents, states)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, totals, documents, states = ctx.saved_tensors
        call = _Call(q, k, v, totals, documents, ctx.scale)
        with torch.cuda.device_of(q):
            d_states = call.walk(d_out, True)
            dq, dk, d_logs = call.gradients(d_out, states, d_states)
            dv = call.outputs(d_out, d_states, True)
        return dq, _of_key_heads(dk, k), _of_key_heads(dv, v), d_logs, None, None


def _of_key_heads(d_BHSD: Tensor, like_BKSD: Tensor) -> Tensor:
    """Summed over the query heads that read a head of keys; gates are the query heads' own."""
    heads = like_BKSD.shape[1]
    if d_BHSD.shape[1] == heads:
        return d_BHSD
    return d_BHSD.unflatten(1, (heads, -1)).sum(2, dtype=torch.float32).to(d_BHSD.dtype)


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def gated_linear_totals_kernel(logs, totals, length, keys, X: tl.constexpr, C: tl.constexpr):
    """A program: X dimensions of a chunk."""
    line, first, column = chunk_of(length, keys, C, X)
    place, inside = rows_of(line, first, length, column, keys, C, X)
    tl.store(totals + place, tl.cumsum(tl.load(logs + place, mask=inside, other=0.0), 0), mask=inside)


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
        places, inside = state_at(states, wide(line) * chunks + n, keys, values, row, column, False, X, Z)
        tl.store(places, narrowed(state, states.dtype.element_ty), mask=inside)
        total = _totals(totals, line, first, length, row, keys, C, X)
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
        total = _totals(totals, line, first, length, column, keys, C, X)
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
        total = _totals(totals, line, first, length, x, keys, C, X)
        if BACK:
            factor = tl.exp(
                _totals_at(totals, line, last_of(first, length, C), length, x, keys, X)[None, :] - total
            )
        else:
            factor = tl.exp(total) * scale
        left = part(a, b, a_head, first, length, x, keys, C, X).to(tl.float32) * factor * reads
        places, inside = state_at(states, number, keys, values, x, column, False, X, Z)
        state = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        found = tl.dot(as_operand(left, like), as_operand(state, like), found, input_precision="ieee")
    products = products_of(weights, line, first, length, BACK, C)
    others = part(y, b, y_head, first, length, column, values, C, Z)
    found = tl.dot(as_operand(products.to(tl.float32), like), others, found, input_precision="ieee")
    place, inside = rows_of(line, first, length, column, values, C, Z)
    tl.store(result + place, narrowed(found, result.dtype.element_ty), mask=inside)


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
        places, inside = state_at(states, number, keys, values, z, column, True, Z, X)
        state = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        asked = tl.dot(slope, as_operand(state, like), asked, input_precision="ieee")
        places, inside = state_at(d_states, number, keys, values, z, column, True, Z, X)
        d_state = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        handed = tl.dot(value, as_operand(d_state, like), handed, input_precision="ieee")
        passed += tl.sum(state * d_state, 0)
    slopes *= within(None, documents, b, line, first, length, False, C) * scale
    total = _totals(totals, line, first, length, column, keys, C, X)
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
    place, inside = rows_of(line, first, length, column, keys, C, X)
    tl.store(dq + place, narrowed(asked, dq.dtype.element_ty), mask=inside)
    tl.store(dk + place, narrowed(handed, dk.dtype.element_ty), mask=inside)
    d_total = tl.where(inside, queries * asked - key * handed, 0.0)
    tl.store(d_logs + place, tl.cumsum(d_total, 0, reverse=True) + passed[None, :], mask=inside)


# -- tiles ---------------------------------------------------------------------------------------------------------


@triton.jit
def _totals(totals, line, first, length, column, width, C: tl.constexpr, W: tl.constexpr):
    place, inside = rows_of(line, first, length, column, width, C, W)
    return tl.load(totals + place, mask=inside, other=0.0)


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
