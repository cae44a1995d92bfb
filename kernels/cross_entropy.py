"""Head and cross-entropy in one, in chunks of rows: the full logits [N, V] never exist.

Gradients are computed in the forward, while a chunk's logits are at hand (Liger Kernel, Hsu et al. 2024), so the
head's product is done once; the backward only scales them. Loss and softmax are fp32 (fp64 for fp64) also where
the products are bf16. A teacher's soft targets may be learnt beside, from the same logits; see `soft_targets`.

Shapes: N rows (tokens), E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.fused import fused
from headway.kernels.precision import product_dtype
from headway.kernels.soft_targets import Lesson, Soft, SoftRowLoss, Teacher, soft_row_loss

IGNORE = -100
"""Label of a row that is not scored."""

RowLoss = Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]


class Options(NamedTuple):
    """What the loss is made of beside cross-entropy.

    Attributes:
        z_loss: weight of the squared log-partition (Chowdhery et al. 2022, section 5).
        smoothing: share of the target's probability that is spread over all words (Szegedy et al. 2016, section 7).
        accuracy: count rows whose likeliest word is the label; costs a pass over the logits.
    """

    z_loss: float = 0.0
    smoothing: float = 0.0
    accuracy: bool = False


class Losses(NamedTuple):
    """Sums over rows whose label is not IGNORE, 0-dim, and what they are sums of, fp32 or fp64.

    Attributes:
        total: cross-entropy in nats plus z_loss x squared log-partition; with a teacher `soft.task` x that plus
            `soft.weight` x τ² D. It alone has a gradient.
        z: the squared log-partition's part, times z_loss.
        correct: rows whose likeliest word is the label; 0 if not asked for.
        each: [N], a row's part of the first sum, 0 of a row that is not scored.
        task: the loss without a teacher.
        soft: τ² D, without its weight; 0 without a teacher.
    """

    total: Tensor
    z: Tensor
    correct: Tensor
    each: Tensor
    task: Tensor
    soft: Tensor


def linear_cross_entropy(
    hidden_NE: Tensor,
    weight_VE: Tensor,
    labels_N: Tensor,
    options: Options = Options(),
    chunk: int | None = None,
    compute: RowLoss | None = None,
    bias_V: Tensor | None = None,
    soft: Soft | None = None,
    teacher: Teacher | None = None,
    compute_soft: SoftRowLoss | None = None,
) -> Losses:
    """Cross-entropy of hidden @ weight^T + bias, summed over rows whose label is not IGNORE.

    Args:
        hidden_NE: rows; products are in autocast's dtype where it is on, else in the rows' dtype.
        weight_VE: the head's weight.
        labels_N: int64.
        options: what is added and counted.
        chunk: at most so many rows of logits exist at once; see `chunk_rows`.
        compute: `row_loss` or a compiled form of it.
        bias_V: the head's bias.
        soft: how a teacher counts; without a teacher nothing of it does.
        teacher: of the same rows and words.
        compute_soft: `soft_row_loss` or a compiled form of it.

    Raises:
        ValueError: a teacher without `soft`, of other rows or words; see `Soft`.
    """
    gradients = torch.is_grad_enabled() and (hidden_NE.requires_grad or weight_VE.requires_grad)
    lesson = None
    if teacher is not None:
        if soft is None:
            raise ValueError("teacher is given, soft is None: it must say how the teacher counts")
        lesson = Lesson(soft, teacher, compute_soft or soft_row_loss)
        lesson.check(len(hidden_NE), len(weight_VE))
    asked = options, chunk, compute or row_loss, gradients, lesson
    return Losses(*_LinearCrossEntropy.apply(hidden_NE, weight_VE, bias_V, labels_N, *asked))


def chunk_rows(vocab: int, itemsize: int, device: str) -> int:
    """Rows whose logits take 64 MiB on CPU, whose products of fewer rows are slower (1,024 rows of 16,384 words take
    as long as 2,048), and 256 MiB elsewhere."""
    budget = 2**26 if device == "cpu" else 2**28
    return max(128, budget // (vocab * itemsize) // 64 * 64)


def row_loss(
    logits_NV: Tensor,
    labels_N: Tensor,
    z_loss: float,
    gradients: bool,
    smoothing: float = 0.0,
    accuracy: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of cross-entropy, of weighted squared log-partition, and of rows whose likeliest word is the label; and of
    every row the first two together, [N].

    With `gradients`, the gradient of their sum by the logits takes the logits' place in memory. Written to be fused
    by the compiler, and with few passes over memory where it is not compiled; on GPUs a Triton kernel makes two.
    """
    if fused(logits_NV):
        from headway.kernels.triton import cross_entropy as fast

        return fast.row_loss(logits_NV, labels_N, z_loss, gradients, smoothing, accuracy)
    wide = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    valid = (labels_N != IGNORE).unsqueeze(1)
    target = torch.where(valid, labels_N.unsqueeze(1), 0)
    log_p = torch.log_softmax(wide, 1)
    picked = log_p.gather(1, target)
    lse = wide.gather(1, target) - picked
    correct = ((wide.argmax(1) == labels_N) & valid.squeeze(1)).sum() if accuracy else valid.new_zeros(())
    chosen = picked if smoothing == 0 else (1 - smoothing) * picked + smoothing * log_p.mean(1, keepdim=True)
    each_nll, each_z = torch.where(valid, chosen, 0), torch.where(valid, lse.square(), 0)
    nll, z = -each_nll.sum(), each_z.sum() * z_loss
    if gradients:
        slope = torch.where(valid, 1 + 2 * z_loss * lse, 0)
        gradient = log_p.exp_().mul_(slope)
        if smoothing:
            gradient = gradient - valid.to(wide.dtype) * (smoothing / wide.shape[1])
        if torch.compiler.is_compiling():  # a scatter would end the fusion
            column = torch.arange(wide.shape[1], device=wide.device)
            gradient = gradient - (1 - smoothing) * ((column == target) & valid).to(wide.dtype)
        else:
            gradient.scatter_add_(1, target, (smoothing - 1) * valid.to(wide.dtype))
        logits_NV.copy_(gradient)
    return nll, z, correct.to(wide.dtype), (each_z * z_loss - each_nll).squeeze(1)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, labels, options, chunk, compute, gradients, lesson):
        narrow = product_dtype(hidden)
        x, w = hidden.to(narrow), weight.to(narrow)
        b = None if bias is None else bias.to(narrow)
        lesson = lesson and lesson.narrowed()
        with torch.autocast(x.device.type, enabled=False):
            losses, slopes = _over_chunks(x, w, b, labels, options, chunk, compute, gradients, lesson)
        if gradients:
            ctx.save_for_backward(*slopes)
            ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.mark_non_differentiable(*losses[1:])
        return tuple(losses)

    @staticmethod
    def backward(ctx, d_total, *_):
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        slopes = (None if slope is None else (slope * d_total).to(dtype) for slope, dtype in pairs)
        return *slopes, *[None] * 6


def _over_chunks(x, w, bias, labels, options, chunk, compute, gradients, lesson):
    """Losses, and the gradients of hidden states, weight and bias (None without `gradients`).

    Buffers serve all chunks: memory that is fresh for every chunk would cost as many page faults as there are logits.
    """
    count, device = x.shape[0], x.device
    wide = torch.promote_types(x.dtype, torch.float32)
    chunk = chunk or chunk_rows(w.shape[0], w.element_size(), device.type)
    rows = max(1, -(-count // max(1, -(-count // chunk))))  # chunks of one size, as far as rows divide
    task, z_total, correct, soft = (torch.zeros((), dtype=wide, device=device) for _ in range(4))
    each = torch.empty(count, dtype=wide, device=device)
    logits = x.new_empty(rows, w.shape[0])
    taught = lesson and lesson.buffer(rows)
    d_hidden = torch.empty_like(x) if gradients else None
    d_weight = torch.zeros_like(w, dtype=wide) if gradients else None
    d_bias = torch.zeros_like(bias, dtype=wide) if gradients and bias is not None else None
    product = torch.empty_like(w) if gradients and x.dtype != wide else None
    learnt = gradients and (lesson is None or lesson.soft.task != 0)
    asked = options.z_loss, learnt, options.smoothing, options.accuracy
    for start in range(0, count, rows):
        part = x[start : start + rows]
        slope = logits[: part.shape[0]]
        torch.mm(part, w.T, out=slope)
        if bias is not None:
            slope += bias
        chosen = labels[start : start + rows]
        heard = lesson and lesson.heard(slope, chosen != IGNORE, start, taught, gradients)
        nll, z, hits, each[start : start + rows] = compute(slope, chosen, *asked)
        task, z_total, correct = task + nll + z, z_total + z, correct + hits
        if heard is not None:
            soft = soft + heard[0]
            lesson.mix(slope, each[start : start + rows], *heard[1:])
        if d_hidden is None or d_weight is None:
            continue
        torch.mm(slope, w, out=d_hidden[start : start + rows])
        if d_bias is not None:
            d_bias += slope.sum(0, dtype=wide)
        if product is None:
            d_weight.addmm_(slope.T, part)
        else:  # a narrow sum over chunks would lose bits
            _add(d_weight, torch.mm(slope.T, part, out=product))
    total = task.clone() if lesson is None else lesson.soft.task * task + lesson.soft.weight * soft
    return Losses(total, z_total, correct, each, task, soft), (d_hidden, d_weight, d_bias)


def _add(total: Tensor, part: Tensor) -> None:
    """total += part, of fewer bits. On CPU PyTorch widens the part first, in fresh memory: a block of rows at a time
    stays in the caches, and takes a quarter of the time."""
    rows = max(1, _CACHED // total.shape[1]) if total.device.type == "cpu" else len(total)
    for start in range(0, len(total), rows):
        total[start : start + rows] += part[start : start + rows]


_CACHED = 1 << 18
"""Numbers of a block."""
