"""Cross-entropy of rows of logits, alone and over ranks, and within the head's loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE, Options, linear_cross_entropy
from headway.kernels.cross_entropy import row_loss as reference
from headway.kernels.triton.cross_entropy import row_loss, row_loss_over
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, seed
from headway.tests.kernels.triton.ranks import over_ranks

Z_LOSS = 1e-2
UNIT = 2.0**-24
ROUNDING = {torch.float32: UNIT, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _operands(rows: int, vocab: int, dtype: torch.dtype, scale: float) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed())
    logits = (drawn(draw, rows, vocab) * scale).detach().to(dtype)
    labels = torch.randint(0, vocab, (rows,), generator=draw)
    labels[1::5] = IGNORE
    labels[2::5] = logits[2::5].argmax(1)
    return logits, labels


def _case(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    smoothing: float = 0.0,
    accuracy: bool = False,
    z_loss: float = 0.0,
    gradients: bool = True,
    scale: float = 3.0,
    ranks: int = 0,
    biased: bool = False,
    change: Callable[[Tensor, Tensor], None] | None = None,
) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        logits, labels = _operands(rows, vocab, dtype, scale)
        if change is not None:
            change(logits, labels)
        bias = drawn(torch.Generator().manual_seed(seed() + 1), vocab).detach() if biased else None
        wide = logits.double() if bias is None else logits.double() + bias.double()
        asked = z_loss, gradients, smoothing, accuracy
        largest = float(wide[wide.isfinite()].abs().max())
        wanted = [*reference(wide, labels, *asked), wide]
        if ranks:
            found = _by_ranks(logits.to(device), labels.to(device), ranks, asked)
        else:
            ours = logits.to(device)
            there = None if bias is None else bias.to(device)
            found = [*row_loss(ours, labels.to(device), *asked, there), ours]
        return _results(found, wanted, dtype, largest, z_loss)

    return compute


def _results(
    found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, largest: float, z_loss: float
) -> Mapping[str, Result]:
    """Of a row: sums of V / W exponentials in a lane, and some roundings of numbers up to the largest logit; lse^2 has
    twice that of lse, times lse. A gradient is within 1 + 2 z lse, rounded once to its dtype."""
    rows = len(wanted[3])
    error = UNIT * (64 + 8 * largest)
    partition = (largest + 12) * z_loss
    each = error * (1 + 2 * partition) + 8 * UNIT * partition * (largest + 12)
    gradient = wanted[4]
    slope = 64 * UNIT * (1 + 2 * partition) + 2 * z_loss * error
    tolerances = [rows * each, rows * each, 0.0, each, float(gradient.abs().max()) * ROUNDING[dtype] + slope]
    names = "nll", "z", "correct", "each", "gradient"
    return {n: Result(f, w, t) for n, f, w, t in zip(names, found, wanted, tolerances, strict=True)}


def _by_ranks(logits: Tensor, labels: Tensor, ranks: int, asked: Any) -> list[Tensor]:
    """What the ranks agree upon, and their gradients side by side."""
    vocab = logits.shape[1]
    step = -(-vocab // ranks)
    kept: dict[int, Tensor] = {}

    def of(rank: int, total: Any) -> Any:
        kept[rank] = logits[:, rank * step : (rank + 1) * step].contiguous()
        return row_loss_over(rank * step, vocab, total)(kept[rank], labels, *asked)

    sums = over_ranks(ranks, of)
    for one, other in zip(sums[0], sums[-1], strict=True):
        assert torch.equal(one, other)
    return [*sums[0], torch.cat([kept[rank] for rank in range(ranks)], 1)]


def _masked(logits: Tensor, labels: Tensor) -> None:
    """A whole tile of words that cannot be, among them the first, and rows of one word that can."""
    logits[:, :40] = -float("inf")
    logits[3, 1:] = -float("inf")
    labels.clamp_(min=40)
    logits[3, 50], labels[3] = 1.0, 50


def _tied(logits: Tensor, labels: Tensor) -> None:
    """Largest logits twice: the first is the likeliest word."""
    logits[:, 7] = logits[:, 60] = 50.0
    labels[::2], labels[1::2] = 7, 60


def _unscored(logits: Tensor, labels: Tensor) -> None:
    labels.fill_(IGNORE)


def _head(dtype: torch.dtype, options: Options) -> Case:
    """The head's loss with the kernel, beside the same with PyTorch's form: products are equal."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        given = [drawn(draw, *size, dtype=dtype).detach() for size in ((37, 16), (67, 16), (67,))]
        labels = torch.randint(0, 67, (37,), generator=draw)
        labels[3:9] = IGNORE
        sides = []
        for form in (row_loss, None):
            x, w, b = (t.to(device, copy=True).requires_grad_() for t in given)
            losses = linear_cross_entropy(x, w, labels.to(device), options, 16, form, b)
            gradients = torch.autograd.grad(losses.total, [x, w, b])
            sides.append([losses.total.detach(), losses.z, losses.correct, losses.each, *gradients])
        return {
            name: Result(found, wanted.cpu().double(), tolerance)
            for name, found, wanted, tolerance in zip(
                ("total", "z", "correct", "each", "d_hidden", "d_weight", "d_bias"),
                *sides,
                head_tolerances(given, dtype, options.z_loss, sides[1]),
                strict=True,
            )
        }

    return compute


def head_tolerances(
    given: list[Tensor], dtype: torch.dtype, z_loss: float, wanted: list[Tensor]
) -> list[float]:
    """Slopes that differ by roundings in fp32 may be rounded to neighbours in the dtype; a row's are 2 (1 + 2 z lse) in
    all, and a column's errors are of either sign. Gradients are rounded once more."""
    x, w = given[:2]
    largest = float((x.float() @ w.float().T).abs().max()) + 4
    partition = (largest + 12) * z_loss
    each = UNIT * (64 + 8 * largest) * (1 + 4 * partition)
    slope = (2 * ROUNDING[dtype] + 64 * UNIT) * 2 * (1 + 2 * partition)
    sums = [float(size.abs().max()) * slope for size in (w, x)]
    gradients = [sums[0], sums[1] * len(x) ** 0.5, slope * len(x) ** 0.5]
    rounded = [float(g.abs().max()) * 2 * ROUNDING[dtype] for g in wanted[-3:]]
    return [len(x) * each, len(x) * each, 0.0, each, *map(sum, zip(gradients, rounded, strict=True))]


_F32, _BF16 = torch.float32, torch.bfloat16
_ALL: dict[str, Any] = {"smoothing": 0.1, "accuracy": True, "z_loss": Z_LOSS}
OFTEN = ("3 ranks, 5,000 words, bf16, all", "words that cannot be")
CASES: dict[str, Case] = {
    "17 x 5,000, fp32, all": _case(17, 5000, _F32, **_ALL),
    "1 x 40, fp32": _case(1, 40, _F32),
    "9 x 9,001, bf16": _case(9, 9001, _BF16),
    "9 x 9,001, bf16, a bias": _case(9, 9001, _BF16, **_ALL, biased=True),
    "3 ranks, 5,000 words, bf16, all": _case(11, 5000, _BF16, **_ALL, ranks=3),
    "30 x 257, fp16, all": _case(30, 257, torch.float16, **_ALL),
    "33 x 128, fp32, no gradients": _case(33, 128, _F32, **_ALL, gradients=False),
    "12 x 4,097, bf16, accuracy": _case(12, 4097, _BF16, accuracy=True),
    "12 x 4,097, fp32, smoothing": _case(12, 4097, _F32, smoothing=0.2),
    "12 x 4,097, fp32, z loss": _case(12, 4097, _F32, z_loss=Z_LOSS),
    "two classes": _case(6, 2, _F32, **_ALL),
    "10,000 either way": _case(12, 5000, _F32, scale=2500.0, accuracy=True),
    "10,000 either way, bf16": _case(12, 5000, _BF16, scale=2500.0),
    "words that cannot be": _case(12, 4200, _F32, accuracy=True, z_loss=Z_LOSS, change=_masked),
    "words that cannot be, 4 ranks": _case(12, 120, _F32, accuracy=True, ranks=4, change=_masked),
    "ties": _case(12, 4200, _F32, accuracy=True, change=_tied),
    "ties over ranks": _case(12, 120, _F32, accuracy=True, ranks=2, change=_tied),
    "no row is scored": _case(12, 200, _F32, **_ALL, change=_unscored),
    "no row is scored, 2 ranks": _case(12, 200, _F32, **_ALL, ranks=2, change=_unscored),
    "2 ranks, no gradients": _case(12, 200, _F32, gradients=False, ranks=2),
    "the head, fp32": _head(_F32, Options(Z_LOSS, 0.1, True)),
    "the head, bf16": _head(_BF16, Options()),
}


def scored_rows(valid: Tensor) -> int:
    """Rows that are read; all where nobody knows."""
    return len(valid) if valid.is_meta else int(valid.sum())


def _whole(launch: Launch, passes: int, gradients: bool, least: float, kept: float, said: float) -> Cost:
    """Rows that are scored are read as often as they are passed over, with the bias, and before the first time one
    word of each row; all are written."""
    given = launch.arguments
    logits, bias, labels = given["logits"], given["bias"], given["labels"]
    rows, vocab = logits.shape
    item = logits.element_size() + (0 if bias is None else bias.element_size())
    picked = item if launch.name != "cross_entropy_close_kernel" else 0
    read = passes * scored_rows(labels != IGNORE) * vocab * item + rows * (
        labels.element_size() + picked + said
    )
    written = rows * (vocab * logits.element_size() * gradients + kept)
    return Cost(read, written, least, 0, 8 * passes * rows * vocab)


def bytes_of(*given: Any) -> int:
    """Of tensors, each number once."""
    return sum(x.numel() * x.element_size() for x in given if isinstance(x, Tensor))


def _one(launch: Launch) -> Cost:
    """Least: logits once, and their gradient."""
    given = launch.arguments
    gradients = bool(given["GRADIENTS"])
    logits = given["logits"]
    least = bytes_of(logits, given["bias"], given["labels"], given["parts"]) + gradients * bytes_of(logits)
    return _whole(launch, 1 + gradients, gradients, least, 12 if given["ACCURACY"] else 8, 0)


def _own(launch: Launch) -> Cost:
    given = launch.arguments
    kept = 4 * (3 + given["SMOOTHING"]) + 8 * (given["place"] is not None)
    return _whole(launch, 1, False, bytes_of(*given.values()), kept, 0)


def _close(launch: Launch) -> Cost:
    given = launch.arguments
    gradients, place = bool(given["GRADIENTS"]), given["place"] is not None
    logits = given["logits"]
    others = [x for name, x in given.items() if name != "logits"]
    least = bytes_of(*others) + 2 * gradients * bytes_of(logits)
    said = 4 * (3 + given["SMOOTHING"]) + 8 * place
    return _whole(launch, int(gradients), gradients, least, 8 + 4 * place, said)


COSTS = {
    "cross_entropy_kernel": _one,
    "cross_entropy_own_kernel": _own,
    "cross_entropy_close_kernel": _close,
}
