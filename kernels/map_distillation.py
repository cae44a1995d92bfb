"""Distillation of attention maps without the maps: a student's rows of weights are matched with a teacher's in O(S).

A map has Q x S numbers for every head; a model of 12 heads at 4,096 tokens holds 3 GiB of them for a layer, twice. Yet
a row's loss is a sum over keys of what its log-sum-exp and two scores say, and so is its gradient. Let t and s be the
scores (scale q k^T + bias) of teacher and student over the n keys that a row sees, LT and LS their log-sum-exps,
p_j = exp(t_j - LT), q_j = exp(s_j - LS), m = (p + q) / 2. Losses of a row (weights in [0, 1], logarithms in nats):

    kl          KL(p || q) = sum_j p_j (log p_j - log q_j)      Hinton et al. 2015; MiniLM, Wang et al. 2020, eq. 5
    reverse_kl  KL(q || p) = sum_j q_j (log q_j - log p_j)      Gu et al. 2024, eq. 2
    js          (KL(p || m) + KL(q || m)) / 2                   Lin 1991, eq. 4.1
    mse         sum_j (q_j - p_j)^2 / n                         of weights
    scores      sum_j (s_j - t_j)^2 / n                         TinyBERT, Jiao et al. 2020, eq. 7

For D = sum_j f(p_j, q_j) and g = df/dq, the softmax gives dD/ds_j = q_j (g_j - sum_k q_k g_k): a second sum, the
*centre*, and no more.

    kl          g = -p / q            centre -1, hence dD/ds = q - p
    reverse_kl  g = log(q / p)        centre D; of g + 1, the 1 cancels
    js          g = log(q / m) / 2
    mse         g = 2 (q - p) / n
    scores      dD/ds = 2 (s - t) / n itself

With ds = dD/ds, dq = scale ds k and dk = scale ds^T q take a block of ds away as it comes. Scores, sums and gradients
are fp32 (fp64 for fp64); products are in autocast's dtype where it is on, else in the operands'.

A teacher with G times the student's heads is averaged: p is the mean of the maps of heads h G to h G + G - 1 (`scores`:
of their scores). Nothing ever flows to the teacher.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension, R relation
heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.dense import score_scale
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias, Fixed
from headway.kernels.maps import chunked, reference
from headway.kernels.maps.checks import check_operands, described
from headway.kernels.maps.operands import Scores, Sums
from headway.kernels.precision import product_dtype

KERNELS = ("reference", "chunked", "triton")


class MapSums(NamedTuple):
    """A loss of maps, by sample.

    Attributes:
        loss_B: sum over the rows that count of the mean over the student's heads, fp32 (fp64 for fp64),
            differentiable.
        rows_B: int64, how many rows count: those that see a key and are no padding.
    """

    loss_B: Tensor
    rows_B: Tensor


def map_distillation_loss(
    q_teacher: Tensor,
    k_teacher: Tensor,
    q_student: Tensor,
    k_student: Tensor,
    *,
    loss: str = "kl",
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    teacher_bias: Fixed | None = None,
    student_bias: Bias | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Loss of the student's attention maps against the teacher's, 0-dim: the mean over rows and the student's heads.

    The mean is over the rows that count: those that see a key and are no padding; 0 if there are none.
    Differentiable in `q_student`, `k_student`, and in `student_bias` if it is a tensor.

    Args:
        q_teacher, k_teacher: [B, G H, Q, D'], [B, K', S, D'], of any head dimension; fp64, fp32, fp16 or bf16.
        q_student, k_student: [B, H, Q, D], [B, K, S, D]; K divides H.
        loss: `kl`, `reverse_kl`, `js`, `mse` or `scores`; see above.
        causal: a row sees no key after it; queries and keys are then as many. Adds to `mask`.
        mask: a `Mask`; or bool [B, S], false where keys (and queries, if they are as many) are padding; or bool,
            broadcastable to [B, 1, Q, S], true where a row sees a key.
        scale: factor of products; 1 / sqrt(D) of each model if None.
        teacher_scale: the teacher's, where it is another.
        teacher_bias, student_bias: [heads, Q, S], finite, or what describes it; added to the scores.
        kernel: `reference`, `chunked`, `triton`, or `auto`: Triton on GPUs, chunks elsewhere.

    Raises:
        ValueError: shapes, dtypes, heads or masks do not fit, or `loss` is unknown.
        KernelUnavailable: the kernel is unknown, or cannot run here.
    """
    sums = map_distillation_sums(
        q_teacher, k_teacher, q_student, k_student, loss=loss, causal=causal, mask=mask, scale=scale,
        teacher_scale=teacher_scale, teacher_bias=teacher_bias, student_bias=student_bias, kernel=kernel,
    )  # fmt: skip
    return sums.loss_B.sum() / sums.rows_B.sum().clamp(min=1)


def map_distillation_sums(
    q_teacher: Tensor,
    k_teacher: Tensor,
    q_student: Tensor,
    k_student: Tensor,
    *,
    loss: str = "kl",
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    teacher_scale: float | None = None,
    teacher_bias: Fixed | None = None,
    student_bias: Bias | None = None,
    kernel: str = "auto",
) -> MapSums:
    """Sums of every sample and the rows that they are of. Arguments: see `map_distillation_loss`."""
    teacher_scale = scale if teacher_scale is None else teacher_scale
    fixed = teacher_bias.detach() if isinstance(teacher_bias, Tensor) else teacher_bias
    q_teacher, k_teacher = (x.detach().to(product_dtype(x)) for x in (q_teacher, k_teacher))
    q_student, k_student = (x.to(product_dtype(x)) for x in (q_student, k_student))
    teacher = Scores(q_teacher, k_teacher, score_scale(teacher_scale, q_teacher), fixed)
    student = Scores(q_student, k_student, score_scale(scale, q_student), student_bias)
    check_operands(teacher, student, loss)
    seen = described(mask, causal, student)
    rows_BQ = seen.rows(student)
    batch, _, queries, _ = q_student.shape
    rows_B = torch.full((batch,), queries, device=q_student.device) if rows_BQ is None else rows_BQ.sum(1)
    compute = choose(kernel, teacher, student)
    with torch.autocast(q_student.device.type, enabled=False):
        return MapSums(compute(teacher, student, loss, seen, rows_BQ), rows_B)


def choose(kernel: str, teacher: Scores, student: Scores) -> Sums:
    """The function that computes the sums: Triton on GPUs, but for fp64.

    Raises:
        KernelUnavailable: it is unknown, or cannot compute these.
    """
    if kernel not in ("auto", *KERNELS):
        raise KernelUnavailable(kernel, f"maps are distilled by {', '.join(KERNELS)}", "auto")
    device = student.q.device
    able = device.type == "cuda" and torch.float64 not in (teacher.q.dtype, student.q.dtype)
    if kernel == "triton" and not able:
        rule = f"it takes no fp64 and runs on cuda, not on {device}"
        raise KernelUnavailable(kernel, rule, "chunked")
    if kernel == "triton" or (kernel == "auto" and able):
        from headway.kernels.triton.map_distillation import sums  # Triton is not installed everywhere

        return sums
    return reference.sums if kernel == "reference" else chunked.sums


def relation_loss(
    a_teacher: Tensor,
    a_student: Tensor,
    *,
    heads: int,
    loss: str = "kl",
    causal: bool = False,
    mask: Mask | Tensor | None = None,
    kernel: str = "auto",
) -> Tensor:
    """Loss of self-attention relations, 0-dim (MiniLM, Wang et al. 2020, 3.2; v2, Wang et al. 2021, 3.1).

    A relation is softmax(a a^T / sqrt(d)) of queries, keys or values a, split anew into as many heads for both models.

    Args:
        a_teacher, a_student: queries, keys or values, [B, H, S, D], of any H and D.
        heads: relation heads; must divide H D of both.
        loss, causal, mask, kernel: see `map_distillation_loss`.
    """
    teacher, student = (relation_heads(a, heads) for a in (a_teacher, a_student))
    return map_distillation_loss(
        teacher, teacher, student, student, loss=loss, causal=causal, mask=mask, kernel=kernel
    )


def relation_heads(a_BHSD: Tensor, heads: int) -> Tensor:
    """Heads joined and split anew, [B, R, S, H D / R].

    Raises:
        ValueError: `heads` does not divide the width.
    """
    width = a_BHSD.shape[1] * a_BHSD.shape[3]
    if heads < 1 or width % heads:
        raise ValueError(f"heads = {heads}: relation heads must divide the width, {width}")
    return a_BHSD.transpose(1, 2).flatten(2).unflatten(2, (heads, width // heads)).transpose(1, 2)
