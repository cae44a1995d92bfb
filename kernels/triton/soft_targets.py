"""A teacher's soft targets: what `kernels.soft_targets.soft_row_loss` computes, of all its words or of k, also where
words are spread over ranks. The kernels are in `soft_targets_kernels`.

PyTorch's operators pass some twenty times over two chunks of logits in fp32, of which they make copies. Here a program
has a row of both. It passes over them once for the divergence, as far as that is forward or reverse, and again for the
gradient, which needs the sums over all words first; js, whose sum is of logarithms of normalized sums, takes a pass
more. A row of a usual vocabulary does not fit into registers; the L2 cache answers later passes while the rows in
flight fit into it. Unscored rows are not read.

The gradient takes the place of the teacher's logits, which `linear_cross_entropy` computes anew for every chunk; those
of the student stay, for cross-entropy is computed from them too. It has their dtype, fp32 in the reference: of bf16 it
is rounded once more before it is added to that of cross-entropy.

Of a teacher of k words, kernels pass over V words, once for the outcomes and once for the gradient; k + 1 numbers a row
are PyTorch's between them, by the reference's own lines, as they are where words are spread over ranks.

Shapes: N rows (tokens), V vocabulary (of this rank), k words of the teacher that are kept, O = k + 1 outcomes, P
numbers of a row.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from headway.kernels.soft_targets import Soft, TopTeacher, Total, alone, over_outcomes
from headway.kernels.triton.cross_entropy import check_logits, row_config
from headway.kernels.triton.soft_targets_kernels import (
    soft_targets_close_kernel,
    soft_targets_halves_kernel,
    soft_targets_kernel,
    soft_targets_outcomes_kernel,
    soft_targets_own_kernel,
    soft_targets_spread_kernel,
)
from headway.kernels.triton.tuning import Config, Space

WORDS = 1024
"""Of a teacher's k words, so many at once."""


def _both_configs(target: str, vocab: int) -> list[Config]:
    return [row_config(vocab, words) for words in (2048, 4096)]


def _one_configs(target: str, vocab: int) -> list[Config]:
    return [row_config(vocab, words) for words in (4096, 2048)]


BOTH = Space("soft_targets_both", _both_configs)
ONE = Space("soft_targets_one", _one_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
def soft_row_loss(
    logits_NV: Tensor,
    teacher: Tensor | TopTeacher,
    valid_N: Tensor,
    soft: Soft,
    gradients: bool,
    total: Total = alone,
    first: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The sum of τ² D over rows, that of every row [N], both fp32, and with `gradients` the gradient of weight x sum,
    [N, V].

    Args:
        teacher: its logits [N, V], whose memory the gradient takes, or these rows of its k words, with which the
            gradient has the dtype of the student's logits.
        valid_N: bool; other rows count as 0, and are not read.
        total: (x, "sum" or "max") -> that over all ranks, where each has some words.
        first: words [first, first + V) are this rank's.

    Raises:
        ValueError: logits of a dtype or strides that kernels of rows do not take.
    """
    check_logits(logits_NV)
    valid_N = valid_N.contiguous()
    with torch.cuda.device_of(logits_NV):
        if isinstance(teacher, TopTeacher):
            each_N, gradient_NV = _of_top(logits_NV, teacher, valid_N, soft, gradients, total, first)
        else:
            check_logits(teacher, "teacher's logits")
            each_N = (_of_all if total is alone else _over_ranks)(
                logits_NV, teacher, valid_N, soft, gradients, total
            )
            gradient_NV = teacher if gradients else None
    return each_N.sum(), each_N, gradient_NV


def _of_all(logits_NV, teacher_NV, valid_N, soft, gradients, total):
    """τ² D of every row, in one kernel; the gradient is in the teacher's place."""
    rows, vocab = logits_NV.shape
    each_N = logits_NV.new_empty(rows, dtype=torch.float32)
    size = logits_NV.stride(0), teacher_NV.stride(0), vocab
    given = logits_NV, teacher_NV, valid_N, each_N, *size, *_numbers(soft)
    how = {"KIND": soft.divergence, "GRADIENTS": gradients}
    soft_targets_kernel[rows,](*given, **how, **_chosen(BOTH, logits_NV))
    return each_N


def _over_ranks(logits_NV, teacher_NV, valid_N, soft, gradients, total):
    """`_of_all` where others have the other words: two reductions of some numbers a row, of js three."""
    rows, vocab = logits_NV.shape
    js = soft.divergence == "js"
    inverse, *others = _numbers(soft)
    each_N = logits_NV.new_empty(rows, dtype=torch.float32)
    tops_2N, sums_PN = each_N.new_empty(2, rows), each_N.new_empty(2 if js else 3, rows)
    both = logits_NV, teacher_NV, valid_N
    size = rows, logits_NV.stride(0), teacher_NV.stride(0), vocab, inverse
    options = _chosen(BOTH, logits_NV)
    soft_targets_own_kernel[rows,](*both, tops_2N, sums_PN, *size, KIND=soft.divergence, **options)
    tops_2N, own_2N = total(tops_2N, "max").contiguous(), tops_2N
    sums_PN = total(_rebased(sums_PN, own_2N - tops_2N, soft.divergence), "sum").contiguous()
    halves_2N = None
    if js:
        halves_2N = torch.empty_like(own_2N)
        soft_targets_halves_kernel[rows,](*both, tops_2N, sums_PN, halves_2N, *size, **options)
        halves_2N = total(halves_2N, "sum").contiguous()
    said = tops_2N, sums_PN, halves_2N, each_N
    how = {"KIND": soft.divergence, "GRADIENTS": gradients}
    soft_targets_close_kernel[rows,](*both, *said, *size, *others, **how, **options)
    return each_N


def _rebased(sums_PN: Tensor, shift_2N: Tensor, divergence: str) -> Tensor:
    """Masses and their cross term, relative to largest logits that are higher by -shift: as a kernel does between
    tiles."""
    mass_2N = sums_PN[:2]
    factor_2N = shift_2N.exp()
    if divergence == "js":
        return mass_2N * factor_2N
    of, other = (1, 0) if divergence == "forward" else (0, 1)
    cross_N = factor_2N[of] * (sums_PN[2] + mass_2N[of] * (shift_2N[of] - shift_2N[other]))
    return torch.cat([mass_2N * factor_2N, cross_N[None]])


def _of_top(logits_NV, teacher, valid_N, soft, gradients, total, first):
    """τ² D of every row over the teacher's words and any other, and the gradient."""
    rows, vocab = logits_NV.shape
    indices_Nk = teacher.indices_Nk.contiguous()
    words = indices_Nk.shape[1]
    own_NO = logits_NV.new_empty(rows, words + 1, dtype=torch.float32)
    size = logits_NV.stride(0), vocab, words, first, 1 / soft.temperature
    tile = min(WORDS, triton.next_power_of_2(words))
    options = {"K": tile, **_chosen(ONE, logits_NV)}
    soft_targets_outcomes_kernel[rows,](logits_NV, indices_Nk, valid_N, own_NO, *size, **options)
    own_NO[:, :-1] *= size[-1]
    scale_N1 = valid_N.unsqueeze(1) * (soft.temperature * soft.weight)
    each_N, slope_NO, rest_N1 = over_outcomes(own_NO, teacher, scale_N1, soft, gradients, total)
    each_N = torch.where(valid_N, each_N * soft.temperature**2, 0)
    if slope_NO is None:
        return each_N, None
    gradient_NV = torch.empty_like(logits_NV, memory_format=torch.contiguous_format)
    given = logits_NV, gradient_NV, indices_Nk, valid_N, slope_NO.contiguous(), rest_N1.contiguous()
    soft_targets_spread_kernel[rows,](*given, *size, **options)
    return each_N, gradient_NV


def _numbers(soft: Soft) -> tuple[float, float, float]:
    return 1 / soft.temperature, float(soft.temperature), float(soft.weight)


def _chosen(space: Space, logits_NV: Tensor) -> dict[str, int]:
    vocab = triton.next_power_of_2(logits_NV.shape[1])
    return space.choose(logits_NV.device, vocab=vocab).options
