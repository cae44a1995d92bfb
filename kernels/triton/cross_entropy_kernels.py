"""Kernels of `cross_entropy`: a program has a row.

With m the largest logit x of a row and s = sum exp(x - m): lse = m + log s, loss = lse - x[label] + z_loss lse^2, and
gradient = exp(x - m) (1 + 2 z_loss lse) / s - [label]; of smoothing e, the target is e / V + (1 - e) [label].

Shapes: W words of a tile.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from headway.kernels.cross_entropy import IGNORE
from headway.kernels.triton.numbers import narrowed

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

    Lanes have sums of their own, so that there is one reduction a tile, and so that rounding grows with V / W; the
    place is looked for in tiles that have a larger logit than all before, of which there are few. The label's logit is
    read before the last reduction, at which threads wait for each other: then none has written its gradient.
    """
    lane = tl.arange(0, W)
    top = tl.full((), LOWEST, tl.float32)
    exponentials = tl.zeros([W], tl.float32)
    every = tl.zeros([W], tl.float32)
    place = tl.full((), 0, tl.int32) + width
    for begin in range(0, width, W):
        column = begin + lane
        inside = column < width
        x = _words(line, bias, column, inside)
        highest = tl.max(x, 0)
        if PLACE:  # noqa: SIM102  # known when compiled, unlike what is within
            if highest > top:
                place = tl.min(tl.where(x == highest, column, width), 0)
        above = tl.maximum(top, highest)
        exponentials = exponentials * tl.exp(top - above) + tl.exp(x - above)
        top = above
        if EVERY:
            every += tl.where(inside, x, 0.0)
    known = (label >= 0) & (label < width)
    picked = tl.load(line + tl.where(known, label, 0)).to(tl.float32)
    if bias is not None:
        picked += tl.load(bias + tl.where(known, label, 0)).to(tl.float32)
    return top, tl.sum(exponentials, 0), tl.where(known, picked, 0.0), tl.sum(every, 0), place


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
