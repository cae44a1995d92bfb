"""Cross-entropy of rows of logits, and its gradient in their place: what `kernels.cross_entropy.row_loss` computes, and
its halves for words that are spread over ranks. The kernels are in `cross_entropy_kernels`.

PyTorch's operators pass over a chunk of logits some ten times, most of them in fp32, and `F.cross_entropy` writes a
gradient beside the logits. Here a program has a row, and passes over it twice, because the gradient of the first word
needs the sum of exponentials over all, and a row of a usual vocabulary does not fit into registers: once to read, once
to read again, from the L2 cache while the rows in flight fit into it, and to write. Unscored rows are not read.

The products with the head stay torch.mm, by chunks of rows, in `linear_cross_entropy`. A kernel that multiplies as well
would spare writing and reading logits, 12 bytes each in bf16 (written, read twice, their gradient written and read by
two products): 3.6 ps on an H100. But its gradients need the softmax of whole rows first, so that it multiplies once
more: 2 E FLOPs, 8.3 ps with E = 4,096; what is spared pays for them below E = 1,800, at a rate that cuBLAS alone has.

Shapes: N rows (tokens), V vocabulary (of this rank), P numbers of a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from headway.kernels.cross_entropy import RowLoss
from headway.kernels.soft_targets import Total
from headway.kernels.triton.cross_entropy_kernels import (
    cross_entropy_close_kernel,
    cross_entropy_kernel,
    cross_entropy_own_kernel,
)
from headway.kernels.triton.tuning import Config, Space

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Of logits."""


def _configs(target: str, vocab: int) -> list[Config]:
    return [row_config(vocab, words) for words in (4096, 8192, 2048)]


def row_config(vocab: int, words: int) -> Config:
    """16 words of a tile to a thread of NVIDIA's, 8 to one of AMD's: loads of 16 bytes."""
    tile = min(words, max(32, vocab))
    return Config({"W": tile}, max(1, tile // 512), 1)


ROW = Space("cross_entropy_row", _configs)


class Shares(NamedTuple):
    """What a rank's words say of every row, fp32; of a row that is not scored, what changes nothing.

    Attributes:
        top_N: the largest logit.
        sums_PN: to be added over ranks: exponentials relative to top_N, the label's logit, and with smoothing the
            sum of all logits.
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
