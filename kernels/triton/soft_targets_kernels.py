"""Kernels of `soft_targets`: a program has a row, and a teacher beside it.

With z / τ of a student and a teacher, m their largest and s = sum exp(z / τ - m): log q = (z_q / τ - m_q) - log s_q,
and log p alike. The mean of log p - log q by p is that of the differences (z_p / τ - m_p) - (z_q / τ - m_q), summed
with the exponentials and corrected where a largest grows, and log s_q - log s_p; that of log q - log p by q is alike.
So either is known after one pass.

Shapes: W words of a tile, K of the teacher's words of a tile.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import math

import triton
import triton.language as tl

from headway.kernels.triton.cross_entropy_kernels import LOWEST
from headway.kernels.triton.numbers import narrowed

LOG_2 = tl.constexpr(math.log(2))


@triton.jit
def soft_targets_kernel(
    student,
    teacher,
    valid,
    each,
    student_stride,
    teacher_stride,
    width,
    inverse,
    temperature,
    weight,
    KIND: tl.constexpr,
    GRADIENTS: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row, from both's logits to the divergence and, in the teacher's place, its gradient."""
    row = tl.program_id(0)
    scored = tl.load(valid + row) != 0
    length = tl.where(scored, width, 0)
    q = student + row.to(tl.int64) * student_stride
    p = teacher + row.to(tl.int64) * teacher_stride
    m_q, m_p, s_q, s_p, cross = _masses(q, p, length, inverse, KIND, W)
    log_q, log_p = tl.log(s_q), tl.log(s_p)
    if KIND == "js":
        d, mean = _halves(q, p, length, inverse, m_q, m_p, log_q, log_p, W)
    else:
        d = _mean(cross, s_q, s_p, log_q, log_p, KIND)
        mean = d
    tl.store(each + row, tl.where(scored, d * temperature * temperature, 0.0))
    if GRADIENTS:
        known = m_q, m_p, log_q, log_p, mean
        _slopes(q, p, length, width, inverse, *known, temperature * weight, KIND, W)


@triton.jit
def soft_targets_own_kernel(
    student,
    teacher,
    valid,
    tops,
    sums,
    rows,
    student_stride,
    teacher_stride,
    width,
    inverse,
    KIND: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row of this rank's words. Writes the largest, the masses relative to it, and but for js their cross
    term."""
    row = tl.program_id(0)
    length = tl.where(tl.load(valid + row) != 0, width, 0)
    q = student + row.to(tl.int64) * student_stride
    p = teacher + row.to(tl.int64) * teacher_stride
    m_q, m_p, s_q, s_p, cross = _masses(q, p, length, inverse, KIND, W)
    tl.store(tops + row, m_q)
    tl.store(tops + rows + row, m_p)
    tl.store(sums + row, s_q)
    tl.store(sums + rows + row, s_p)
    if KIND != "js":
        tl.store(sums + 2 * rows + row, cross)


@triton.jit
def soft_targets_halves_kernel(
    student,
    teacher,
    valid,
    tops,
    sums,
    halves,
    rows,
    student_stride,
    teacher_stride,
    width,
    inverse,
    W: tl.constexpr,
):
    """A program: what a row of this rank's words gives to js, and its student's half, once masses are known."""
    row = tl.program_id(0)
    length = tl.where(tl.load(valid + row) != 0, width, 0)
    q = student + row.to(tl.int64) * student_stride
    p = teacher + row.to(tl.int64) * teacher_stride
    m_q, m_p = tl.load(tops + row), tl.load(tops + rows + row)
    log_q, log_p = tl.log(tl.load(sums + row)), tl.log(tl.load(sums + rows + row))
    d, mean = _halves(q, p, length, inverse, m_q, m_p, log_q, log_p, W)
    tl.store(halves + row, d)
    tl.store(halves + rows + row, mean)


@triton.jit
def soft_targets_close_kernel(
    student,
    teacher,
    valid,
    tops,
    sums,
    halves,
    each,
    rows,
    student_stride,
    teacher_stride,
    width,
    inverse,
    temperature,
    weight,
    KIND: tl.constexpr,
    GRADIENTS: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row's divergence from what all ranks say, and the gradient by this rank's words."""
    row = tl.program_id(0)
    scored = tl.load(valid + row) != 0
    m_q, m_p = tl.load(tops + row), tl.load(tops + rows + row)
    s_q, s_p = tl.load(sums + row), tl.load(sums + rows + row)
    log_q, log_p = tl.log(s_q), tl.log(s_p)
    if KIND == "js":
        d = tl.load(halves + row)
        mean = tl.load(halves + rows + row)
    else:
        d = _mean(tl.load(sums + 2 * rows + row), s_q, s_p, log_q, log_p, KIND)
        mean = d
    tl.store(each + row, tl.where(scored, d * temperature * temperature, 0.0))
    if GRADIENTS:
        q = student + row.to(tl.int64) * student_stride
        p = teacher + row.to(tl.int64) * teacher_stride
        known = m_q, m_p, log_q, log_p, mean
        length = tl.where(scored, width, 0)
        _slopes(q, p, length, width, inverse, *known, temperature * weight, KIND, W)


@triton.jit
def soft_targets_outcomes_kernel(
    logits,
    indices,
    valid,
    own,
    stride,
    width,
    words,
    first,
    inverse,
    K: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row's logits of the teacher's words, and the log-sum-exp of all others' logits / τ.

    What is left of a mass after a subtraction would have no digit that holds where words have most of it. So the words
    are taken out of the row, which belongs to this program, while it is read, and put back.
    """
    row = tl.program_id(0)
    scored = tl.load(valid + row) != 0
    length = tl.where(scored, width, 0)
    count = tl.where(scored, words, 0)
    line = logits + row.to(tl.int64) * stride
    theirs = indices + row.to(tl.int64) * words
    said = own + row.to(tl.int64) * (words + 1)
    like = logits.dtype.element_ty
    for begin in range(0, words, K):
        word = begin + tl.arange(0, K)
        here, mine = _here(theirs, word, words, first, length)
        x = tl.load(line + here, mask=mine, other=-float("inf")).to(tl.float32)
        tl.store(said + word, tl.where(word < count, x, 0.0), mask=word < words)
        tl.debug_barrier()  # a number may be loaded by several threads, and stored by another
        tl.store(line + here, narrowed(tl.full([K], -float("inf"), tl.float32), like), mask=mine)
    tl.debug_barrier()
    lane = tl.arange(0, W)
    top = tl.full((), LOWEST, tl.float32)
    mass = tl.zeros([W], tl.float32)
    for begin in range(0, length, W):
        x = _scaled(line, begin + lane, length, inverse)
        above = tl.maximum(top, tl.max(x, 0))
        mass = mass * tl.exp(top - above) + tl.exp(x - above)
        top = above
    tl.store(said + words, tl.where(scored, top + tl.log(tl.sum(mass, 0)), 0.0))
    tl.debug_barrier()
    for begin in range(0, count, K):
        word = begin + tl.arange(0, K)
        here, mine = _here(theirs, word, words, first, length)
        x = tl.load(said + word, mask=word < words, other=0.0)
        tl.store(line + here, narrowed(x, like), mask=mine)


@triton.jit
def soft_targets_spread_kernel(
    logits,
    gradient,
    indices,
    valid,
    slopes,
    rest,
    stride,
    width,
    words,
    first,
    inverse,
    K: tl.constexpr,
    W: tl.constexpr,
):
    """A program: a row's gradient from its slopes by outcomes. Other words share theirs as they share their mass."""
    row = tl.program_id(0)
    scored = tl.load(valid + row) != 0
    length = tl.where(scored, width, 0)
    line = logits + row.to(tl.int64) * stride
    out = gradient + row.to(tl.int64) * width
    theirs = indices + row.to(tl.int64) * words
    slope = slopes + row.to(tl.int64) * (words + 1)
    others = tl.load(slope + words)
    mass = tl.load(rest + row)
    like = gradient.dtype.element_ty
    lane = tl.arange(0, W)
    for begin in range(0, width, W):
        column = begin + lane
        x = _scaled(line, column, length, inverse)
        share = tl.where(column < length, tl.exp(x - mass) * others, 0.0)
        tl.store(out + column, narrowed(share, like), mask=column < width)
    tl.debug_barrier()  # the words' own slopes are written after what other threads wrote in their place
    for begin in range(0, tl.where(scored, words, 0), K):
        word = begin + tl.arange(0, K)
        here, mine = _here(theirs, word, words, first, length)
        tl.store(out + here, narrowed(tl.load(slope + word, mask=mine, other=0.0), like), mask=mine)


@triton.jit
def _here(theirs, word, words, first, length):
    """Columns of the teacher's words among [first, first + length), and which of them are."""
    here = tl.load(theirs + word, mask=word < words, other=-1).to(tl.int64) - first
    return here, (word < words) & (here >= 0) & (here < length)


@triton.jit
def _scaled(line, column, length, inverse):
    """Logits / τ of a tile, fp32; -inf where there is none."""
    return tl.load(line + column, mask=column < length, other=-float("inf")).to(tl.float32) * inverse


@triton.jit
def _masses(q, p, length, inverse, KIND: tl.constexpr, W: tl.constexpr):
    """Of a row: the largest logit / τ of student and teacher, the sums of exponentials relative to them, and but for js
    the sum of differences by the teacher's ("forward") or by the student's ("reverse").

    Lanes have sums of their own. A word without mass counts as 0, also where its logarithm is infinite.
    """
    lane = tl.arange(0, W)
    m_q = tl.full((), LOWEST, tl.float32)
    m_p = tl.full((), LOWEST, tl.float32)
    s_q = tl.zeros([W], tl.float32)
    s_p = tl.zeros([W], tl.float32)
    cross = tl.zeros([W], tl.float32)
    for begin in range(0, length, W):
        x_q = _scaled(q, begin + lane, length, inverse)
        x_p = _scaled(p, begin + lane, length, inverse)
        top_q = tl.maximum(m_q, tl.max(x_q, 0))
        top_p = tl.maximum(m_p, tl.max(x_p, 0))
        x_q -= top_q
        x_p -= top_p
        e_q, e_p = tl.exp(x_q), tl.exp(x_p)
        d_q, d_p = m_q - top_q, m_p - top_p
        f_q, f_p = tl.exp(d_q), tl.exp(d_p)
        if KIND == "forward":
            cross = f_p * (cross + s_p * (d_p - d_q)) + tl.where(e_p > 0, e_p * (x_p - x_q), 0.0)
        if KIND == "reverse":
            cross = f_q * (cross + s_q * (d_q - d_p)) + tl.where(e_q > 0, e_q * (x_q - x_p), 0.0)
        s_q = s_q * f_q + e_q
        s_p = s_p * f_p + e_p
        m_q, m_p = top_q, top_p
    return m_q, m_p, tl.sum(s_q, 0), tl.sum(s_p, 0), tl.sum(cross, 0)


@triton.jit
def _mean(cross, s_q, s_p, log_q, log_p, KIND: tl.constexpr):
    """The divergence, forward or reverse, from sums."""
    if KIND == "forward":
        return cross / s_p + (log_q - log_p)
    return cross / s_q + (log_p - log_q)


@triton.jit
def _shares(q, p, log_q, log_p):
    """What words give to js, and the student's half of it: q log(q / m) / 2, m = (p + q) / 2."""
    apart = log_p - log_q
    small = tl.log(1 + tl.exp(-tl.abs(apart)))
    mine = tl.where(q > 0, q / 2 * (LOG_2 - tl.maximum(apart, 0.0) - small), 0.0)
    theirs = tl.where(p > 0, p / 2 * (LOG_2 - tl.maximum(-apart, 0.0) - small), 0.0)
    return mine + theirs, mine


@triton.jit
def _halves(q, p, length, inverse, m_q, m_p, log_q, log_p, W: tl.constexpr):
    """`_shares` summed over a row."""
    lane = tl.arange(0, W)
    total = tl.zeros([W], tl.float32)
    half = tl.zeros([W], tl.float32)
    for begin in range(0, length, W):
        x_q = (_scaled(q, begin + lane, length, inverse) - m_q) - log_q
        x_p = (_scaled(p, begin + lane, length, inverse) - m_p) - log_p
        both, mine = _shares(tl.exp(x_q), tl.exp(x_p), x_q, x_p)
        total += both
        half += mine
    return tl.sum(total, 0), tl.sum(half, 0)


@triton.jit
def _slopes(
    q,
    p,
    length,
    width,
    inverse,
    m_q,
    m_p,
    log_q,
    log_p,
    mean,
    scale,
    KIND: tl.constexpr,
    W: tl.constexpr,
):
    """The gradient by a row of the student's logits, in the place of the teacher's; 0 from `length` on."""
    lane = tl.arange(0, W)
    for begin in range(0, width, W):
        column = begin + lane
        x_q = (_scaled(q, column, length, inverse) - m_q) - log_q
        x_p = (_scaled(p, column, length, inverse) - m_p) - log_p
        e_q, e_p = tl.exp(x_q), tl.exp(x_p)
        if KIND == "forward":
            slope = e_q - e_p
        elif KIND == "reverse":
            slope = tl.where(e_q > 0, e_q * ((x_q - x_p) - mean), 0.0)
        else:
            _, mine = _shares(e_q, e_p, x_q, x_p)
            slope = mine - e_q * mean
        slope = tl.where(column < length, slope * scale, 0.0)
        tl.store(p + column, narrowed(slope, p.dtype.element_ty), mask=column < width)
