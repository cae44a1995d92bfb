"""Causal linear attention: means of values by products of features, what `kernels.attention.linear.featured` computes.

With features q and k (elu + 1, Performer, random features...), weights w_tj = q_t . k_j exp(level_j - level_t) of the
keys j <= t of t's document, z_t = sum_j w_tj: o_t = sum_j w_tj v_j / z_t (Katharopoulos et al. 2020, equations 5 and
9; by chunks, Hua et al. 2022, section 3.3). PyTorch's version is a dozen products and copies for each segment; here one
kernel walks the chunks and writes the state sum_j k_j [v_j 1] that reaches each, and another has a program for every
chunk, which adds the products inside of it.

Backward, with e_t = d_t . o_t: d_w_tj = (d_t . v_j - e_t) / z_t, and gradients are again products inside of chunks and
with a state: dq with the keys' states, dk and dv with sum_t q_t [d_t, -e_t] / z_t, walked from the right. So the same
two kernels compute them, told which operand stands where.

A program of a chunk has some columns of its result, and forms the chunk's products anew for them, as these are cheaper
than writing and reading them: it reads q and k (for dq and dk, d and v) once for every block of columns, and of k and v
each query head its own. The walk reads k for every block of v's columns and v for every block of k's.

Shapes: B batch, H query heads, K key/value heads, S tokens, M features, D head dimension, N chunks, C tokens of a
chunk; in kernels X numbers are summed over and Z are columns of the result.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from headway.kernels.attention.masks import Mask
from headway.kernels.triton.attention_operands import heads as heads_of
from headway.kernels.triton.attention_operands import of_samples
from headway.kernels.triton.numbers import as_operand
from headway.kernels.triton.state_tiles import (
    block,
    border,
    check,
    chunk_size,
    of_tokens,
    part,
    put_part,
    put_state,
    put_tokens,
    state_of,
    state_rows,
    through,
    wide_config,
    within,
)
from headway.kernels.triton.tuning import Config, Space


def _walk_configs(target: str, features: int, width: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=features, Z=width)]
    return [Config({"X": state_rows(target, features), "Z": block(width, z)}, 4, 2) for z in (64, 32)]


def _chunk_configs(target: str, summed: int, columns: int, itemsize: int) -> list[Config]:
    if itemsize == 4:
        return [wide_config(target, X=summed, Z=columns)]
    wide = 32 if target == "sm_80" else 64  # more spills there
    return [Config({"X": block(summed, x), "Z": block(columns, z)}, 4, 2) for x, z in ((64, wide), (32, 32))]


STATES = Space("linear_attention_states", _walk_configs)
OUTPUTS = Space("linear_attention_outputs", _chunk_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def linear_attention(
    q_BHSM: Tensor,
    k_BKSM: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    level_BKS: Tensor | None = None,
    floor: float = 0,
) -> Tensor:
    """Mean of values by products of features, [B, H, S, D] like v; 0 where all of a query's products are.

    Args:
        q_BHSM, k_BKSM: features; of v's dtype.
        mask: causal, with documents or without.
        level_BKS: what logarithms of keys' features were lessened by; it does not fall inside a document, cancels, and
            takes no gradient.
        floor: what z is raised to if it is less, for features whose products may be negative.

    Raises:
        KernelUnavailable: a mask or dtypes that it does not take.
    """
    check("linear_attention", mask, q=q_BHSM, k=k_BKSM, v=v_BKSD)
    level = None if level_BKS is None else level_BKS.detach().float().contiguous()
    documents = of_samples(mask.documents, q_BHSM.shape[0])
    out: Tensor = _LinearAttention.apply(q_BHSM, k_BKSM, v_BKSD, level, documents, float(floor))
    return out


class _Call(NamedTuple):
    """What all kernels of a call share: tensors [B, H, S, ...] and [B, K, S, ...], and what joins their tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    level: Tensor | None
    documents: Tensor | None
    floor: float

    @property
    def chunk(self) -> int:
        """C."""
        return chunk_size(self.q.dtype)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Key heads, tokens, features, values."""
        return self.k.shape[1], self.k.shape[2], self.k.shape[3], self.v.shape[3]

    def rows(self) -> Tensor:
        """Room for a number of every query, fp32 [B, H, S]."""
        return self.q.new_empty(self.q.shape[:3], dtype=torch.float32)

    def walk(self, x: Tensor, y: Tensor, back: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
        """States [B, K, N, M, D] that reach each chunk, and fp32 [B, K, N, M] those of the sums z; `back`: from the
        right, of queries, with 1 / z and -e."""
        batch, (heads, length, features, width) = self.q.shape[0], self.sizes
        config = STATES.choose(x.device, features=features, width=width, itemsize=x.element_size())
        chunks = triton.cdiv(length, self.chunk)
        states = x.new_empty(batch, heads, chunks, features, width)
        sums = x.new_empty(batch, heads, chunks, features, dtype=torch.float32)
        blocks = triton.cdiv(features, config.tiles["X"]) * triton.cdiv(width, config.tiles["Z"])
        given = heads_of(x), heads_of(y), self.level, self.documents, *(back or (None, None)), states, sums
        linear_attention_states_kernel[batch * heads * blocks,](
            *given, heads, x.shape[1] // heads, length, features, width, C=self.chunk, **config.options
        )
        return states, sums

    def chunks(self, what: str, operands: tuple[Tensor, Tensor, Tensor], like: Tensor, *given: Any) -> Tensor:
        """The result `what` of the chunks' kernel, of the shape of `like`."""
        heads, length, *_ = self.sizes
        result = torch.empty_like(like, memory_format=torch.contiguous_format)
        summed, columns = operands[0].shape[3], result.shape[3]
        key = {"summed": summed, "columns": columns, "itemsize": like.element_size()}
        config = OUTPUTS.choose(like.device, **key)
        programs = result.shape[0] * result.shape[1] * triton.cdiv(length, self.chunk)
        programs *= triton.cdiv(columns, config.tiles["Z"])
        places = *map(heads_of, operands), self.level, self.documents, *given, heads_of(result)
        group = self.q.shape[1] // heads
        linear_attention_outputs_kernel[programs,](
            *places, heads, group, length, summed, columns,
            WHAT=what, FLOOR=self.floor, C=self.chunk, **config.options,
        )  # fmt: skip
        return result


class _LinearAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, level, documents, floor):
        call = _Call(q, k, v, level, documents, floor)
        with torch.cuda.device_of(q):
            states, sums = call.walk(k, v, None)
            totals = call.rows()
            like = v.new_empty(1).expand(*q.shape[:3], v.shape[3])
            out = call.chunks("out", (q, k, v), like, None, totals, states, sums)
        ctx.save_for_backward(q, k, v, level, documents, out, totals, states, sums)
        ctx.floor = floor
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        q, k, v, level, documents, out, totals, states, sums = ctx.saved_tensors
        call = _Call(q, k, v, level, documents, ctx.floor)
        with torch.cuda.device_of(q):
            rows = inverse, lean = call.rows(), call.rows()
            width = v.shape[3]
            programs = q.shape[0] * q.shape[1] * triton.cdiv(q.shape[2], call.chunk)
            linear_attention_rows_kernel[programs,](
                heads_of(out), heads_of(d_out), totals, inverse, lean, q.shape[1], q.shape[2], width,
                FLOOR=ctx.floor, C=call.chunk, Z=block(width, 64), num_warps=4, num_stages=2,
            )  # fmt: skip
            dq = call.chunks("dq", (d_out, v, k), q, inverse, lean, states, sums)
            del states, sums
            states, sums = call.walk(q, d_out, rows)
            dk = call.chunks("dk", (v, d_out, q), k, inverse, lean, states, sums)
            dv = call.chunks("dv", (k, q, d_out), v, inverse, None, states, None)
        return dq, dk, dv, *[None] * 3


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def linear_attention_states_kernel(
    x, y, level, documents, inverse, lean, states, sums, heads, group, length, features, width,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: X x Z numbers of a key head's state, chunk by chunk, and the first of a row of programs its sums.

    With `inverse` [B, H, S], from the right to the left: x are queries of the group's heads, weighted by it, y
    gradients, and `sums` are weighted by `lean`."""
    columns = tl.cdiv(width, Z)
    blocks = tl.cdiv(features, X) * columns
    line = tl.program_id(0) // blocks
    b = line // heads
    tile = tl.program_id(0) % blocks
    row = tile // columns * X
    column = tile % columns * Z
    state = tl.zeros([X, Z], tl.float32)
    total = tl.zeros([X], tl.float32)
    chunks = tl.cdiv(length, C)
    feature = row + tl.arange(0, X)
    BACK: tl.constexpr = inverse is not None
    for step in range(chunks):
        n = step
        if BACK:
            n = chunks - 1 - step
        first = n * C
        number = tl.cast(line, tl.int64) * chunks + n
        put_state(states, number, features, width, row, column, state, X, Z)
        if column == 0:
            tl.store(sums + number * features + feature, total, mask=feature < features)
        kept = through(level, documents, b, line, first, length, C)
        state *= kept
        total *= kept
        gives = border(level, documents, b, line, first, length, not BACK, C)
        if BACK:
            for head in range(line % heads * group, line % heads * group + group):
                own = b * heads * group + head
                wide = part(x, b, head, first, length, row, features, C, X).to(tl.float32)
                wide *= (gives * of_tokens(inverse, own, first, length, C))[:, None]
                total += tl.sum(wide * of_tokens(lean, own, first, length, C)[:, None], 0)
                values = part(y, b, head, first, length, column, width, C, Z)
                state = tl.dot(
                    tl.trans(as_operand(wide, y.data.dtype.element_ty)), values, state, input_precision="ieee"
                )
        else:
            wide = (
                part(x, b, line % heads, first, length, row, features, C, X).to(tl.float32) * gives[:, None]
            )
            total += tl.sum(wide, 0)
            values = part(y, b, line % heads, first, length, column, width, C, Z)
            state = tl.dot(
                tl.trans(as_operand(wide, y.data.dtype.element_ty)), values, state, input_precision="ieee"
            )


@triton.jit
def linear_attention_outputs_kernel(
    a, b, y, level, documents, inverse, lean, states, sums, result, heads, group, length, summed, columns,
    WHAT: tl.constexpr, FLOOR: tl.constexpr, X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A program: Z columns of the result of a chunk, sum_j (a_t . b_j) y_j inside of it, and a_t state.

    `out`: a, b, y are q, k, v; what stands in the place of `lean` are the sums z, which are written.
    `dq`: d, v, k. `dk`: v, d, q. `dv`: k, q, d. The last two are of key heads, summed over the heads that read them."""
    BACK: tl.constexpr = WHAT == "dk" or WHAT == "dv"
    blocks = tl.cdiv(columns, Z)
    chunks = tl.cdiv(length, C)
    column = tl.program_id(0) % blocks * Z
    n = tl.program_id(0) // blocks % chunks
    head = tl.program_id(0) // blocks // chunks
    own = heads if BACK else heads * group
    sample = head // own
    head = head % own
    key_head = head if BACK else head // group
    line = sample * heads + key_head
    query_line = sample * heads * group + (key_head * group if BACK else head)
    first = n * C
    number = tl.cast(line, tl.int64) * chunks + n
    other = key_head * group if BACK else key_head
    found = tl.zeros([C, Z], tl.float32)
    weights = tl.zeros([C, C], tl.float32)
    total = tl.zeros([C], tl.float32)
    for x in range(0, summed, X):
        left = part(a, sample, head, first, length, x, summed, C, X)
        right = part(b, sample, other, first, length, x, summed, C, X)
        weights = tl.dot(left, tl.trans(right), weights, input_precision="ieee")
        if WHAT == "dq" or WHAT == "dk":
            state = state_of(states, number, columns, summed, x, column, True, X, Z)
        else:
            state = state_of(states, number, summed, columns, x, column, False, X, Z)
        found = tl.dot(left, as_operand(state, a.data.dtype.element_ty), found, input_precision="ieee")
        if WHAT == "out":
            term = x + tl.arange(0, X)
            sum_of = tl.load(sums + number * summed + term, mask=term < summed, other=0.0)
            total += tl.sum(left.to(tl.float32) * sum_of[None, :], 1)
    if WHAT == "dq" or WHAT == "dk":
        term = column + tl.arange(0, Z)
        sum_of = tl.load(sums + number * columns + term, mask=term < columns, other=0.0)[None, :]
        if WHAT == "dq":
            found += of_tokens(lean, query_line, first, length, C)[:, None] * sum_of
        else:
            found += sum_of
    factor = border(level, documents, sample, line, first, length, BACK, C)
    found *= factor[:, None]
    joined = within(level, documents, sample, line, first, length, BACK, C)
    if WHAT == "out":
        weights *= joined
        total = total * factor + tl.sum(weights, 1)
    else:
        weights = _weighted(weights, joined, inverse, lean, query_line, first, length, BACK, C)
    like = y.data.dtype.element_ty
    values = part(y, sample, other, first, length, column, columns, C, Z)
    found = tl.dot(as_operand(weights, like), values, found, input_precision="ieee")
    if BACK:
        for member in range(1, group):
            weights = tl.zeros([C, C], tl.float32)
            for x in range(0, summed, X):
                left = part(a, sample, head, first, length, x, summed, C, X)
                right = part(b, sample, other + member, first, length, x, summed, C, X)
                weights = tl.dot(left, tl.trans(right), weights, input_precision="ieee")
            weights = _weighted(weights, joined, inverse, lean, query_line + member, first, length, BACK, C)
            values = part(y, sample, other + member, first, length, column, columns, C, Z)
            found = tl.dot(as_operand(weights, like), values, found, input_precision="ieee")
    if WHAT == "out":
        if column == 0:
            put_tokens(lean, query_line, first, length, total, C)
        found = found / _divisor(total, FLOOR)[:, None]
    if WHAT == "dq":
        found *= of_tokens(inverse, query_line, first, length, C)[:, None]
    put_part(result, sample, head, first, length, column, columns, found, C, Z)


@triton.jit
def _weighted(products, joined, inverse, lean, line, first, length, BACK: tl.constexpr, C: tl.constexpr):
    """(products + lean) joined, over z where rows are keys; without `lean`, of products alone."""
    if BACK:
        if lean is not None:
            products += of_tokens(lean, line, first, length, C)[None, :]
        products *= of_tokens(inverse, line, first, length, C)[None, :]
    else:
        products += of_tokens(lean, line, first, length, C)[:, None]
    return products * joined


@triton.jit
def _divisor(total, FLOOR: tl.constexpr):
    """What a sum of values is divided by."""
    if FLOOR > 0:
        return tl.maximum(total, FLOOR)
    return tl.where(total == 0, 1.0, total)


@triton.jit
def linear_attention_rows_kernel(
    out, d_out, totals, inverse, lean, heads, length, width,
    FLOOR: tl.constexpr, C: tl.constexpr, Z: tl.constexpr,
):  # fmt: skip
    """A program: of C rows, one over what they were divided by, and -d . out, which is 0 where that was a constant."""
    chunks = tl.cdiv(length, C)
    line = tl.program_id(0) // chunks
    first = tl.program_id(0) % chunks * C
    found = tl.zeros([C], tl.float32)
    for column in range(0, width, Z):
        left = part(out, line // heads, line % heads, first, length, column, width, C, Z)
        right = part(d_out, line // heads, line % heads, first, length, column, width, C, Z)
        found += tl.sum(left.to(tl.float32) * right.to(tl.float32), 1)
    total = of_tokens(totals, line, first, length, C)
    if FLOOR > 0:
        moves = total >= FLOOR
    else:
        moves = total != 0
    put_tokens(inverse, line, first, length, 1 / _divisor(total, FLOOR), C)
    put_tokens(lean, line, first, length, tl.where(moves, -found, 0.0), C)
