"""Cross-entropy of rows of logits, and its gradient in their place, in one kernel: what `kernels.cross_entropy.row_loss`
computes, and its halves for words that are spread over ranks.

PyTorch's operators pass over a chunk of logits some ten times, most of them in fp32, and cross-entropy that is a part of
PyTorch writes a gradient beside the logits. Here a program has a row. It passes over it twice, because the gradient of
the first word needs the sum of exponentials over all, and a row of a usual vocabulary does not fit into registers: once
to read, once to read again, from the L2 cache while rows in flight fit into it, and to write. A row that is not scored
is not read.

The products with the head stay torch.mm, by chunks of rows, in `linear_cross_entropy`. A kernel that multiplies as well
would spare writing and reading logits, 12 bytes each in bf16 (written, read twice, their gradient written and read by two
products): 3.6 ps on an H100. But its gradients need the softmax of whole rows first, so that it multiplies once more: 2 E
FLOPs, 8.3 ps with E = 4,096, and as much as is spared with E = 1,800, at a rate that cuBLAS alone has.

With m the largest logit x of a row and s = sum exp(x - m): lse = m + log s, loss = lse - x[label] + z_loss lse^2, and
gradient = exp(x - m) (1 + 2 z_loss lse) / s - [label]; of smoothing e, the target is e / V + (1 - e) [label].

Shapes: N rows (tokens), V vocabulary (of this rank); in kernels W words of a tile.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE, RowLoss
from headway.kernels.soft_targets import Total
from headway.kernels.triton.numbers import narrowed
from headway.kernels.triton.tuning import Config, Space

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of logits."""


def _configs(target: str, vocab: int) -> list[Config]:
    return [_row(vocab, words) for words in (4096, 8192, 2048)]


def _row(vocab: int, words: int) -> Config:
    """16 words of a tile to a thread of NVIDIA's, 8 to one of AMD's: loads of 16 bytes."""
    tile = min(words, max(32, vocab))
    return Config({"W": tile}, max(1, tile // 512), 1)


ROW = Space("cross_entropy_row", _configs)


class Shares(NamedTuple):
    """What a rank's words say of every row, fp32; of a row that is not scored, what changes nothing.

    Attributes:
        top_N: the largest logit.
        sums_PN: to be added over ranks: exponentials relative to top_N, the label's logit, and with smoothing the sum of
            all logits.
        place_N: int64, the first word with the largest logit, of the whole vocabulary; if asked for.
    """

    top_N: Tensor
    sums_PN: Tensor
    place_N: Tensor | None


@torch.compiler.disable  # Triton compiles the kernels itself
def row_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    z_loss: float,
    gradients: bool,
    smoothing: float = 0.0,
    accuracy: bool = False,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of cross-entropy, of weighted squared log-partition, and of rows whose likeliest word is the label; and of
    every row the first two together, [N]; all fp32.

    With `gradients`, the gradient of their sum by the logits takes the logits' place in memory, else they stay.

    Args:
        bias_V: added to logits as they are read, in fp32.

    Raises:
        ValueError: logits of another dtype than DTYPES, or whose words are not side by side.
    """
    check_logits(logits_NV)
    rows, vocab = logits_NV.shape
    parts_PN = logits_NV.new_empty(3 if accuracy else 2, rows, dtype=torch.float32)
    config = chosen(logits_NV)
    given = logits_NV, bias_V, labels_N, parts_PN, rows, logits_NV.stride(0), vocab, z_loss, smoothing
    how = {"GRADIENTS": gradients, "SMOOTHING": smoothing != 0, "ACCURACY": accuracy}
    with torch.cuda.device_of(logits_NV):
        cross_entropy_kernel[rows,](*given, **how, **config.options)
    return _sums(parts_PN)


def row_loss_over(first: int, vocabulary: int, total: Total) -> RowLoss:
    """`row_loss` for words [first, first + V) of `vocabulary`, the others on other ranks; sums are equal on all.

    Three reductions of numbers a row, as in the reference.

    Args:
        total: (x, "sum", "max" or "min") -> that over all ranks.
    """

    def compute(
        logits_NV: Tensor,
        labels_N: Tensor,
        z_loss: float,
        gradients: bool,
        smoothing: float = 0.0,
        accuracy: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own = own_shares(logits_NV, labels_N, first, smoothing != 0, accuracy)
        top_N = total(own.top_N, "max")
        own.sums_PN[0].mul_((own.top_N - top_N).exp_())
        sums_PN = total(own.sums_PN, "sum")
        place_N = None
        if own.place_N is not None:
            place_N = total(torch.where(own.top_N == top_N, own.place_N, vocabulary), "min")
        reduced = Shares(top_N, sums_PN, place_N)
        return loss_of_shares(logits_NV, labels_N, first, vocabulary, reduced, z_loss, gradients, smoothing)

    return compute


@torch.compiler.disable
def own_shares(
    logits_NV: Tensor,
    labels_N: Tensor,
    first: int,
    smoothing: bool = False,
    accuracy: bool = False,
    bias_V: Tensor | None = None,
) -> Shares:
    """The first half of a loss over ranks: this rank's words, from `first` on, are read once.

    Args:
        smoothing: whether the sum of logits is wanted.
        accuracy: whether the place of the largest is.
        bias_V: as in `row_loss`.

    Raises:
        ValueError: as `row_loss`.
    """
    check_logits(logits_NV)
    rows, vocab = logits_NV.shape
    top_N = logits_NV.new_empty(rows, dtype=torch.float32)
    sums_PN = top_N.new_empty(3 if smoothing else 2, rows)
    place_N = torch.empty_like(top_N, dtype=torch.int64) if accuracy else None
    config = chosen(logits_NV)
    given = logits_NV, bias_V, labels_N, top_N, sums_PN, place_N, rows, logits_NV.stride(0), vocab, first
    with torch.cuda.device_of(logits_NV):
        cross_entropy_own_kernel[rows,](*given, SMOOTHING=smoothing, **config.options)
    return Shares(top_N, sums_PN, place_N)


@torch.compiler.disable
def loss_of_shares(
    logits_NV: Tensor,
    labels_N: Tensor,
    first: int,
    vocabulary: int,
    reduced: Shares,
    z_loss: float,
    gradients: bool,
    smoothing: float = 0.0,
    bias_V: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The second half: what `row_loss` gives, from shares over all ranks, of `vocabulary` words.

    Args:
        reduced: the largest top of ranks, sums of their sums, exponentials having been made relative to that top, and
            the first place of those whose top it is.
    """
    rows, vocab = logits_NV.shape
    parts_PN = logits_NV.new_empty(2 if reduced.place_N is None else 3, rows, dtype=torch.float32)
    config = chosen(logits_NV)
    size = rows, logits_NV.stride(0), vocab, first, vocabulary, z_loss, smoothing
    given = (
        logits_NV,
        bias_V,
        labels_N,
        *(x if x is None else x.contiguous() for x in reduced),
        parts_PN,
        *size,
    )
    how = {"GRADIENTS": gradients, "SMOOTHING": smoothing != 0}
    with torch.cuda.device_of(logits_NV):
        cross_entropy_close_kernel[rows,](*given, **how, **config.options)
    return _sums(parts_PN)


def check_logits(logits_NV: Tensor, name: str = "logits") -> None:
    """
    Raises:
        ValueError: a dtype or strides that kernels of rows do not take.
    """
    if logits_NV.dtype not in DTYPES:
        kinds = ", ".join(map(str, DTYPES))
        raise ValueError(f"{name} of {logits_NV.dtype}: must be one of {kinds}; PyTorch's form takes any")
    if logits_NV.stride(1) != 1:
        raise ValueError(f"{name} of strides {logits_NV.stride()}: the last must be 1")


def chosen(logits_NV: Tensor) -> Config:
    """With which tiles rows of logits are passed over."""
    return ROW.choose(logits_NV.device, vocab=triton.next_power_of_2(logits_NV.shape[1]))


def _sums(parts_PN: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    nll, z, *correct = parts_PN.sum(1).unbind()
    return nll, z, correct[0] if correct else torch.zeros_like(nll), parts_PN[0] + parts_PN[1]


# -- kernels -------------------------------------------------------------------------------------------------------

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Of fp32: a largest logit so far that leaves exp(-inf - it) = 0."""
UNSCORED = tl.constexpr(IGNORE)


@triton.jit
def cross_entropy_kernel(
    logits,
    bias,
    labels,
    parts,
    rows,
    stride,
    width,
    z_loss,
    smoothing,
    GRADIENTS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    ACCURACY: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row, from its logits to its loss and their gradient."""
    row = tl.program_id(0)
    line = logits + row.to(tl.int64) * stride
    label = tl.load(labels + row).to(tl.int32)
    scored = label != UNSCORED
    length = tl.where(scored, width, 0)
    top, exponentials, picked, every, place = _shares(line, bias, label, length, SMOOTHING, ACCURACY, W)
    numbers = top, exponentials, picked, every
    slope = _loss(parts + row, rows, scored, *numbers, width, z_loss, smoothing, SMOOTHING)
    if ACCURACY:
        tl.store(parts + 2 * rows + row, (scored & (place == label)).to(tl.float32))
    if GRADIENTS:
        _slopes(line, bias, label, length, width, top, slope, smoothing / width, 1 - smoothing, W)


@triton.jit
def cross_entropy_own_kernel(
    logits,
    bias,
    labels,
    top,
    sums,
    place,
    rows,
    stride,
    width,
    first,
    SMOOTHING: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row, of this rank's words; with `place`, where the largest is."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    length = tl.where(label != UNSCORED, width, 0)
    line = logits + row.to(tl.int64) * stride
    here = _here(label, first, width)
    m, exponentials, picked, every, at = _shares(line, bias, here, length, SMOOTHING, place is not None, W)
    tl.store(top + row, m)
    tl.store(sums + row, exponentials)
    tl.store(sums + rows + row, picked)
    if SMOOTHING:
        tl.store(sums + 2 * rows + row, every)
    if place is not None:
        tl.store(place + row, at.to(tl.int64) + first)


@triton.jit
def cross_entropy_close_kernel(
    logits,
    bias,
    labels,
    top,
    sums,
    place,
    parts,
    rows,
    stride,
    width,
    first,
    vocabulary,
    z_loss,
    smoothing,
    GRADIENTS: tl.constexpr,
    SMOOTHING: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row's loss from what all ranks say, and the gradient by this rank's words."""
    row = tl.program_id(0)
    label = tl.load(labels + row)
    scored = label != UNSCORED
    m = tl.load(top + row)
    every = m
    if SMOOTHING:
        every = tl.load(sums + 2 * rows + row)
    numbers = m, tl.load(sums + row), tl.load(sums + rows + row), every
    slope = _loss(parts + row, rows, scored, *numbers, vocabulary, z_loss, smoothing, SMOOTHING)
    if place is not None:
        tl.store(parts + 2 * rows + row, (scored & (tl.load(place + row) == label)).to(tl.float32))
    if GRADIENTS:
        line = logits + row.to(tl.int64) * stride
        here = _here(label, first, width)
        length = tl.where(scored, width, 0)
        _slopes(line, bias, here, length, width, m, slope, smoothing / vocabulary, 1 - smoothing, W)


@triton.jit
def _here(label, first, width):
    """The label's column among words [first, first + width), -1 if it is not there."""
    here = label - first
    return tl.where((here >= 0) & (here < width), here, -1).to(tl.int32)


@triton.jit
def _words(line, bias, column, inside):
    """Logits of a tile, fp32; -inf where there is none."""
    x = tl.load(line + column, mask=inside, other=-float("inf")).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _shares(line, bias, label, width, EVERY: tl.constexpr, PLACE: tl.constexpr, W: tl.constexpr):
    """Of a row: its largest logit, the sum of exponentials relative to it, the label's logit (0 if it is not there),
    the sum of all, and the first place of the largest.

    Lanes have sums of their own, so that there is one reduction a tile, and so that rounding grows with V / W.
    """
    lane = tl.arange(0, W)
    top = tl.full((), LOWEST, tl.float32)
    exponentials = tl.zeros([W], tl.float32)
    picked = tl.zeros([W], tl.float32)
    every = tl.zeros([W], tl.float32)
    best = tl.full([W], -float("inf"), tl.float32)
    place = tl.zeros([W], tl.int32)
    for begin in range(0, width, W):
        column = begin + lane
        inside = column < width
        x = _words(line, bias, column, inside)
        above = tl.maximum(top, tl.max(x, 0))
        exponentials = exponentials * tl.exp(top - above) + tl.exp(x - above)
        top = above
        picked += tl.where(column == label, x, 0.0)
        if EVERY:
            every += tl.where(inside, x, 0.0)
        if PLACE:
            place = tl.where(x > best, column, place)
            best = tl.maximum(x, best)
    at = tl.min(tl.where(best == top, place, width), 0)
    return top, tl.sum(exponentials, 0), tl.sum(picked, 0), tl.sum(every, 0), at


@triton.jit
def _loss(
    parts,
    rows,
    scored,
    top,
    exponentials,
    picked,
    every,
    vocabulary,
    z_loss,
    smoothing,
    SMOOTHING: tl.constexpr,
):
    """Writes a row's cross-entropy and weighted squared log-partition; returns by what exponentials are multiplied in
    the gradient. Differences to the largest logit are taken first: they are small where logits are not."""
    log = tl.log(exponentials)
    nll = (top - picked) + log
    if SMOOTHING:
        nll = (1 - smoothing) * nll + smoothing * ((top - every / vocabulary) + log)
    lse = top + log
    tl.store(parts, tl.where(scored, nll, 0.0))
    tl.store(parts + rows, tl.where(scored, z_loss * lse * lse, 0.0))
    return tl.where(scored, (1 + 2 * z_loss * lse) / exponentials, 0.0)


@triton.jit
def _slopes(line, bias, label, length, width, top, slope, everywhere, there, W: tl.constexpr):
    """The gradient of a row in its logits' place: exponentials times `slope`, less `everywhere`, less `there` of the
    label; 0 from `length` on, which is not read."""
    lane = tl.arange(0, W)
    for begin in range(0, width, W):
        column = begin + lane
        x = _words(line, bias, column, column < length)
        gradient = tl.exp(x - top) * slope - tl.where(column == label, everywhere + there, everywhere)
        gradient = tl.where(column < length, gradient, 0.0)
        tl.store(line + column, narrowed(gradient, line.dtype.element_ty), mask=column < width)
