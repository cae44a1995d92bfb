"""Tiles of chunked linear attention: parts of heads, and how tokens of a chunk hang together with states.

`kernels.attention.linear.scan.Joints` says what the factors are. A chunk's states are kept in the operands' dtype: as
operands of products they are rounded to it anyway; what is carried from chunk to chunk is fp32.

Shapes: B batch, H heads, K key heads, S tokens, N chunks, C tokens of a chunk.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import Mask
from headway.kernels.triton.map_tiles import start_of, wide
from headway.kernels.triton.numbers import narrowed, operand
from headway.kernels.triton.tuning import Config

DTYPES = (torch.float32, torch.bfloat16)

# -- on the host ---------------------------------------------------------------------------------------------------


def chunk_size(dtype: torch.dtype) -> int:
    """C: 64 tokens of 16 bits, rows that a tensor core of sm_90 takes at once; 32 of fp32, as vector units, which
    multiply that on NVIDIA's GPUs, keep all that is summed in registers.

    States then are as many numbers as their tokens' keys or more, twice as many in fp32."""
    return 64 if dtype.itemsize == 2 else 32


def check(name: str, mask: Mask, **operands: Tensor) -> None:
    """Refuse what no kernel of states computes; `operands` have one dtype.

    Raises:
        KernelUnavailable: the mask is not causal over whole sequences, or a dtype is not for these kernels.
    """
    rule = None
    if (
        not mask.triangular
        or mask.scope is not None
        or mask.key_documents is not None
        or mask.split is not None
    ):
        rule = f"{name} takes causal masks of whole sequences, with documents or without, not {mask}"
    found = {key: x.dtype for key, x in operands.items()}
    if len(set(found.values())) > 1 or next(iter(found.values())) not in DTYPES:
        # A sum over a whole sequence is more than fp16 holds.
        rule = f"{name} takes operands of one dtype, fp32 or bf16, not {found}"
    if rule is not None:
        raise KernelUnavailable("triton", rule, "chunked")


def block(width: int, most: int) -> int:
    """Numbers of a row that a tile has: a power of two, at least 16 as products demand."""
    return max(16, min(most, triton.next_power_of_2(width)))


def state_rows(target: str, width: int) -> int:
    """Rows of a state of 16 bits that a program has: 64 at most, and no fewer where tensor cores want as many (wgmma,
    tcgen05)."""
    return 64 if target in ("sm_90a", "sm_100a") else block(width, 64)


def wide_config(target: str, **widths: int) -> Config:
    """Of fp32: 32 numbers of each width, by name; vector units keep all that is summed at once in registers."""
    tiles = {name: block(width, 32) for name, width in widths.items()}
    return Config(tiles, 4, 1) if target == "gfx942" else Config(tiles, 8, 1, 255)  # of 64 lanes there


# -- tiles ---------------------------------------------------------------------------------------------------------


@triton.jit
def part(x, b, head, first, length, column, width, N: tl.constexpr, W: tl.constexpr):
    """N rows of x[b, head] from `first` on, W numbers of each from `column` on; zeros beyond the ends; [N, W]."""
    start = start_of(x, b, head, first) + column
    row = tl.arange(0, N)[:, None]
    place = tl.arange(0, W)[None, :]
    inside = (row < length - first) & (place < width - column)
    return operand(tl.load(start + row * x.place + place, mask=inside, other=0.0))


@triton.jit
def put_part(x, b, head, first, length, column, width, value, N: tl.constexpr, W: tl.constexpr):
    """Writes what `part` reads."""
    start = start_of(x, b, head, first) + column
    row = tl.arange(0, N)[:, None]
    place = tl.arange(0, W)[None, :]
    inside = (row < length - first) & (place < width - column)
    tl.store(start + row * x.place + place, narrowed(value, x.data.dtype.element_ty), mask=inside)


@triton.jit
def state_at(
    states, number, rows, columns, row, column, ACROSS: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """Where numbers of a state are, [R, W], and which there are: of state `number` of many [rows, columns]; `ACROSS`
    gives the transposed one's, of [columns, rows]."""
    start = states + wide(number) * rows * columns
    left = row + tl.arange(0, R)[:, None]
    right = column + tl.arange(0, W)[None, :]
    if ACROSS:
        place = right * columns + left
        inside = (left < columns) & (right < rows)
    else:
        place = left * columns + right
        inside = (left < rows) & (right < columns)
    return start + place, inside


@triton.jit
def state_of(
    states, number, rows, columns, row, column, ACROSS: tl.constexpr, R: tl.constexpr, W: tl.constexpr
):
    """Numbers of a state, fp32 [R, W]: those at `state_at`, zeros beyond the ends."""
    places, inside = state_at(states, number, rows, columns, row, column, ACROSS, R, W)
    return tl.load(places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put_state(states, number, rows, columns, row, column, value, R: tl.constexpr, W: tl.constexpr):
    """Writes what `state_of` reads, not across."""
    places, inside = state_at(states, number, rows, columns, row, column, False, R, W)
    tl.store(places, narrowed(value, states.dtype.element_ty), mask=inside)


@triton.jit
def of_tokens(x, line, first, length, C: tl.constexpr):
    """A number of each token of a chunk, from x [lines, S]; 0 beyond the end; [C]."""
    place = tl.arange(0, C)
    return tl.load(x + wide(line) * length + first + place, mask=place < length - first, other=0)


@triton.jit
def of_token(x, line, place, length):
    """The number of one token."""
    return tl.load(x + wide(line) * length + place)


@triton.jit
def put_tokens(x, line, first, length, value, C: tl.constexpr):
    """Writes what `of_tokens` reads."""
    place = tl.arange(0, C)
    tl.store(x + wide(line) * length + first + place, value, mask=place < length - first)


@triton.jit
def chunk_of(length, width, C: tl.constexpr, W: tl.constexpr):
    """Line, first token and first column of a program that has W columns of a chunk."""
    blocks = tl.cdiv(width, W)
    chunks = tl.cdiv(length, C)
    chunk = tl.program_id(0) // blocks
    return chunk // chunks, chunk % chunks * C, tl.program_id(0) % blocks * W


@triton.jit
def rows_of(line, first, length, column, width, C: tl.constexpr, W: tl.constexpr):
    """Where numbers of a contiguous [lines, S, width] are, [C, W], and which there are."""
    row = tl.arange(0, C)[:, None]
    place = column + tl.arange(0, W)[None, :]
    inside = (row < length - first) & (place < width)
    return (wide(line) * length + first) * width + row * width + place, inside


@triton.jit
def of_rows(x, line, first, length, column, width, C: tl.constexpr, W: tl.constexpr):
    """W numbers of each token of a chunk from `column` on, of x [lines, S, width]; 0 beyond the ends; fp32 [C, W]."""
    place, inside = rows_of(line, first, length, column, width, C, W)
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put_rows(x, line, first, length, column, width, value, C: tl.constexpr, W: tl.constexpr):
    """Writes what `of_rows` reads."""
    place, inside = rows_of(line, first, length, column, width, C, W)
    tl.store(x + place, narrowed(value, x.dtype.element_ty), mask=inside)


@triton.jit
def products_of(weights, line, first, length, BACK: tl.constexpr, C: tl.constexpr):
    """A chunk's rows of [lines, S, C], fp32 [C, C]; transposed if `BACK`."""
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    start = weights + (wide(line) * length + first) * C
    if BACK:
        place, inside = column * C + row, (column < length - first) & (row < C)
    else:
        place, inside = row * C + column, (row < length - first) & (column < C)
    return tl.load(start + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def put_products(weights, line, first, length, value, C: tl.constexpr):
    """Writes what `products_of` reads."""
    row = tl.arange(0, C)[:, None]
    column = tl.arange(0, C)[None, :]
    start = weights + (wide(line) * length + first) * C
    tl.store(
        start + row * C + column,
        narrowed(value, weights.dtype.element_ty),
        mask=(row < length - first) & (column < C),
    )


# -- joints --------------------------------------------------------------------------------------------------------


@triton.jit
def last_of(first, length, C: tl.constexpr):
    """Place of a chunk's last token."""
    return tl.minimum(first + C, length) - 1


@triton.jit
def border(level, documents, b, line, first, length, RIGHT: tl.constexpr, C: tl.constexpr):
    """Factor of each token in the state beyond a border of its chunk, [C] in fp32: `Joints.right`, else `Joints.left`.

    Args:
        level: fp32 [lines, S], which does not fall inside a document, or None; `line` of it.
        documents: int32 [B, S] or None.
    """
    if RIGHT:
        place = last_of(first, length, C)
    else:
        place = tl.maximum(first, 1) - 1
    factor = tl.where(tl.arange(0, C) < length - first, 1.0, 0.0)
    if documents is not None:
        same = of_tokens(documents, b, first, length, C) == of_token(documents, b, place, length)
        factor = tl.where(same, factor, 0.0)
    if level is not None:
        apart = of_tokens(level, line, first, length, C) - of_token(level, line, place, length)
        if not RIGHT:
            apart = -apart
        factor *= tl.exp(tl.where(factor > 0, apart, float("-inf")))
    return factor


@triton.jit
def through(level, documents, b, line, first, length, C: tl.constexpr):
    """Factor of a state that passes a chunk."""
    before = tl.maximum(first, 1) - 1
    last = last_of(first, length, C)
    factor = 1.0
    if level is not None:
        factor = tl.exp(
            tl.minimum(of_token(level, line, before, length) - of_token(level, line, last, length), 0.0)
        )
    if documents is not None:
        same = of_token(documents, b, before, length) == of_token(documents, b, last, length)
        factor = tl.where(same, factor, 0.0)
    return factor


@triton.jit
def within(level, documents, b, line, first, length, BACK: tl.constexpr, C: tl.constexpr):
    """`Joints.within`, fp32 [C, C]: rows queries and columns keys, the other way round if `BACK`."""
    place = tl.arange(0, C)
    row = place[:, None]
    column = place[None, :]
    if BACK:
        seen = (row <= column) & (column < length - first)
    else:
        seen = (row >= column) & (row < length - first)
    if documents is not None:
        own = of_tokens(documents, b, first, length, C)
        seen = seen & (own[:, None] == own[None, :])
    factor = tl.where(seen, 1.0, 0.0)
    if level is not None:
        own = of_tokens(level, line, first, length, C)
        apart = own[None, :] - own[:, None]
        if BACK:
            apart = -apart
        factor = tl.exp(tl.where(seen, apart, float("-inf")))
    return factor
