"""A teacher's soft targets by rows of logits, alone and over ranks, and within the head's loss."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from headway.kernels.cross_entropy import IGNORE, Options, linear_cross_entropy
from headway.kernels.soft_targets import DIVERGENCES, FullTeacher, Soft, TopTeacher
from headway.kernels.soft_targets import soft_row_loss as reference
from headway.kernels.triton.cross_entropy import row_loss
from headway.kernels.triton.soft_targets import soft_row_loss
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, seed
from headway.tests.kernels.triton.proofs.cross_entropy import COSTS as CROSS_ENTROPY
from headway.tests.kernels.triton.proofs.cross_entropy import (
    ROUNDING,
    UNIT,
    bytes_of,
    head_tolerances,
    scored_rows,
)
from headway.tests.kernels.triton.ranks import over_ranks

Said = Tensor | TopTeacher


def _top(logits: Tensor, k: int, temperature: float) -> TopTeacher:
    """The k likeliest words in an order of no meaning, and all logits' log-sum-exp in fp32."""
    values, indices = logits.topk(k, sorted=False)
    return TopTeacher(values, indices.int(), (logits.double() / temperature).logsumexp(1).float())


def _moved(teacher: Said, *how: Any) -> Said:
    if isinstance(teacher, TopTeacher):
        values, indices, lse = teacher
        device = [x for x in how if not isinstance(x, torch.dtype)]
        return TopTeacher(values.to(*how), indices.to(*device) if device else indices, lse.to(*how))
    return teacher.to(*how, copy=True)


def _finite(x: Any) -> Any:
    """Logits of -inf as such that have no mass either, but whose product with it is 0: the reference has NaN."""
    return x.nan_to_num(neginf=-1e30) if isinstance(x, Tensor) else x


def _case(
    rows: int,
    vocab: int,
    dtype: torch.dtype,
    soft: Soft,
    k: int = 0,
    ranks: int = 0,
    gradients: bool = True,
    scale: float = 3.0,
    change: Callable[[Tensor, Tensor], None] | None = None,
) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        student, teacher = ((drawn(draw, rows, vocab) * scale).detach().to(dtype) for _ in range(2))
        valid = torch.ones(rows, dtype=torch.bool)
        valid[1::5] = False
        if change is not None:
            change(student, teacher)
        said = _top(teacher, k, soft.temperature) if k else teacher
        said_64 = _finite(_moved(said, torch.float64))
        wanted = reference(_finite(student.double()), said_64, valid, soft, gradients)
        there = student.to(device, copy=True)
        given = there, _moved(said, device), valid.to(device), soft, gradients
        found = _by_ranks(*given, ranks) if ranks else soft_row_loss(*given)
        tolerances = _tolerances(student, said, soft, dtype, wanted)
        results = {
            "sum": Result(found[0], wanted[0], rows * tolerances[0]),
            "each": Result(found[1], wanted[1], tolerances[0]),
            "student": Result(
                torch.nan_to_num(there, neginf=-1.0), torch.nan_to_num(student, neginf=-1.0).double(), 0.0
            ),
        }
        if wanted[2] is not None:
            assert found[2] is not None
            results["gradient"] = Result(found[2], wanted[2], tolerances[1])
        return results

    return compute


def _tolerances(
    student: Tensor, said: Said, soft: Soft, dtype: torch.dtype, wanted: tuple[Tensor, Tensor, Tensor | None]
) -> tuple[float, float]:
    """Of a row and of a gradient.

    With L the width of logits / τ, D has terms p u, |u| <= 2 L. p is off by its x = log p, and p |x| adds up to at most
    log V < 12, by the roundings of a lane's sum, some eight, and four more; u by 4 L: in all, 2^-24 (64 + 64 L).
    What a teacher's k words leave is off by as much as their sum, so that the student's log q / p of it, which counts
    by q, is off by q / p of that. A word's gradient has its p or q for a factor.
    """
    theirs = said[0] if isinstance(said, TopTeacher) else said
    both = torch.cat([student.double().flatten(), theirs.double().flatten()])
    width = 2 * float(both[both.isfinite()].abs().max()) / soft.temperature
    off = UNIT * (64 + 64 * width)
    q = (student.double() / soft.temperature).softmax(1)
    if isinstance(said, TopTeacher):
        p = (said.values_Nk.double() / soft.temperature - said.lse_N.double()[:, None]).exp()
        if p.shape[1] < q.shape[1]:
            off *= 1 + float(((1 - q.gather(1, said.indices_Nk.long()).sum(1)) / (1 - p.sum(1))).max())
    else:
        p = (said.double() / soft.temperature).softmax(1)
    likeliest = float(torch.maximum(q.max(), p.max()))
    largest = 0.0 if wanted[2] is None else float(wanted[2].abs().max())
    slope = off * likeliest * soft.temperature * soft.weight + largest * ROUNDING[dtype]
    return off * soft.temperature**2, slope


def _by_ranks(
    student: Tensor, said: Said, valid: Tensor, soft: Soft, gradients: bool, ranks: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What the ranks agree upon, and their gradients side by side."""
    step = -(-student.shape[1] // ranks)

    def of(rank: int, total: Any) -> Any:
        part = slice(rank * step, (rank + 1) * step)
        theirs = said if isinstance(said, TopTeacher) else said[:, part].contiguous()
        mine = student[:, part].contiguous()
        found = soft_row_loss(mine, theirs, valid, soft, gradients, total, rank * step)
        assert torch.equal(mine, student[:, part])
        return found

    (one, each, gradient), *others = over_ranks(ranks, of)
    for other in others:
        assert torch.equal(each, other[1])
    if gradient is None:
        return one, each, None
    return one, each, torch.cat([gradient, *(other[2] for other in others)], 1)


def _masked(student: Tensor, teacher: Tensor) -> None:
    """A tile and more of words that neither can say."""
    student[:, :2100] = teacher[:, :2100] = -float("inf")


def _alike(student: Tensor, teacher: Tensor) -> None:
    teacher.copy_(student)


def _silent(student: Tensor, teacher: Tensor) -> None:
    """Words that the teacher alone cannot say, with which its rows begin."""
    teacher[:, :2100] = -float("inf")


def _head(dtype: torch.dtype, kind: str, k: int) -> Case:
    """The head's loss with both kernels, beside the same with PyTorch's forms: products are equal."""
    soft = Soft(2.0, kind, 0.7, 0.3)

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        sizes = (37, 16), (67, 16), (67,), (37, 7), (67, 7)
        *given, x_t, w_t = (drawn(draw, *size, dtype=dtype).detach() for size in sizes)
        labels = torch.randint(0, 67, (37,), generator=draw)
        labels[3:9] = IGNORE
        said = _top(x_t.float() @ w_t.float().T, k, 2.0) if k else FullTeacher(x_t, w_t)
        teacher = type(said)(*(None if x is None else x.to(device) for x in said))
        asked = Options(1e-2), 16
        sides = []
        for forms in ((row_loss, soft_row_loss), (None, None)):
            x, w, b = (t.to(device, copy=True).requires_grad_() for t in given)
            where = x, w, labels.to(device)
            losses = linear_cross_entropy(*where, *asked, forms[0], b, soft, teacher, forms[1])
            gradients = torch.autograd.grad(losses.total, [x, w, b])
            sides.append([losses.total.detach(), losses.soft, losses.correct, losses.each, *gradients])
        # A slope of the teacher's is tau x weight x (1 + L) at most, and is rounded once more.
        spread = float((given[0].float() @ given[1].float().T).abs().max()) + 4
        more = 1 + 2 * soft.temperature * soft.weight * (1 + spread)
        tolerances = [more * x for x in head_tolerances(given, dtype, 1e-2, sides[1])]
        names = "total", "soft", "correct", "each", "d_hidden", "d_weight", "d_bias"
        return {
            name: Result(found, wanted.cpu().double(), tolerance)
            for name, found, wanted, tolerance in zip(names, *sides, tolerances, strict=True)
        }

    return compute


_F32, _BF16 = torch.float32, torch.bfloat16
_SIZES = ((1, 40, _F32), (11, 2500, _F32), (7, 5001, _BF16), (12, 257, torch.float16))
OFTEN = ("words that the teacher cannot say, 2 ranks",)
CASES: dict[str, Case] = {
    f"{rows} x {vocab}, {dtype}, {kind}{f', {ranks} ranks' if ranks else ''}": _case(
        rows, vocab, dtype, Soft(1.0 + 2 * (rows > 1), kind, 0.7), ranks=ranks
    )
    for (rows, vocab, dtype), kind, ranks in itertools.product(_SIZES, DIVERGENCES, (0, 3))
    if ranks == 0 or rows == 11
} | {
    f"{rows} x {vocab}, {dtype}, {k} words, {kind}{f', {ranks} ranks' if ranks else ''}": _case(
        rows, vocab, dtype, Soft(2.0, kind, 0.7), k, ranks
    )
    for (rows, vocab, dtype, k), kind, ranks in itertools.product(
        ((1, 40, _F32, 1), (11, 2500, _F32, 8), (7, 5001, _BF16, 13)), DIVERGENCES, (0, 3)
    )
    if ranks == 0 or rows == 11
}
for _kind in DIVERGENCES:
    CASES |= {
        f"all words are the teacher's, {_kind}": _case(5, 130, _F32, Soft(1.5, _kind), 130),
        f"10,000 either way, {_kind}": _case(9, 2500, _F32, Soft(1.0, _kind), scale=2500.0),
        f"words that neither can say, {_kind}": _case(6, 4300, _F32, Soft(2.0, _kind), change=_masked),
        f"a student like its teacher, {_kind}": _case(6, 300, _F32, Soft(2.0, _kind), change=_alike),
        f"no gradients, {_kind}": _case(6, 300, _BF16, Soft(2.0, _kind), gradients=False),
        f"no gradients, 2 ranks, {_kind}": _case(6, 300, _F32, Soft(2.0, _kind), ranks=2, gradients=False),
        f"the head, fp32, {_kind}": _head(_F32, _kind, 0),
        f"the head, bf16, {_kind}": _head(_BF16, _kind, 0),
        f"the head, fp32, 5 words, {_kind}": _head(_F32, _kind, 5),
    }
CASES["words that the teacher cannot say"] = _case(6, 4300, _F32, Soft(2.0), change=_silent)
CASES["words that the teacher cannot say, 2 ranks"] = _case(6, 4200, _F32, Soft(2.0), ranks=2, change=_silent)
CASES["1,500 words of 2,000"] = _case(4, 2000, _F32, Soft(2.0), 1500)
CASES["no gradients, 7 words"] = _case(6, 300, _F32, Soft(2.0), 7, gradients=False)
CASES["the head, bf16, 5 words"] = _head(_BF16, "forward", 5)


def _both(launch: Launch, passes: int, said: float, kept: float, gradients: bool) -> Cost:
    """Scored rows of student and teacher are read as often as they are passed over; the teacher's are written."""
    given = launch.arguments
    student, teacher = given["student"], given["teacher"]
    rows, vocab = student.shape
    item = student.element_size() + teacher.element_size()
    read = passes * scored_rows(given["valid"]) * vocab * item + rows * (1 + said)
    written = rows * (vocab * teacher.element_size() * gradients + kept)
    others = [x for name, x in given.items() if name not in ("student", "teacher")]
    least = bytes_of(*others) + (bytes_of(student, teacher) if passes else 0)
    least += gradients * bytes_of(teacher)
    return Cost(read, written, least, 0, 20 * passes * rows * vocab)


def _one(launch: Launch) -> Cost:
    given = launch.arguments
    gradients = bool(given["GRADIENTS"])
    return _both(launch, 1 + (given["KIND"] == "js") + gradients, 0, 4, gradients)


def _close(launch: Launch) -> Cost:
    gradients = bool(launch.arguments["GRADIENTS"])
    js = launch.arguments["KIND"] == "js"
    return _both(launch, int(gradients), 16 + (8 if js else 4), 4, gradients)


def _own(launch: Launch) -> Cost:
    return _both(launch, 1, 0, 16 if launch.arguments["KIND"] == "js" else 20, False)


def _halves(launch: Launch) -> Cost:
    return _both(launch, 1, 16, 8, False)


def _mine(given: dict[str, Any]) -> int:
    """Words of the teacher's that are here, of scored rows; all where nobody knows."""
    indices, valid = given["indices"], given["valid"]
    if indices.is_meta:
        return int(indices.numel())
    here = indices[valid].long() - given["first"]
    return int(((here >= 0) & (here < given["width"])).sum())


def _outcomes(launch: Launch) -> Cost:
    """The teacher's words are read twice, before and after the pass, and its logits are taken out and put back."""
    given = launch.arguments
    logits, indices = given["logits"], given["indices"]
    rows, k = indices.shape
    scored, mine, item = scored_rows(given["valid"]), _mine(given), logits.element_size()
    read = rows + (rows + scored) * k * indices.element_size() + mine * item
    read += scored * (logits.shape[1] * item + 4 * k)
    written = rows * (k + 1) * 4 + 2 * mine * item
    return Cost(read, written, bytes_of(*given.values()), 0, 6 * logits.numel())


def _spread(launch: Launch) -> Cost:
    given = launch.arguments
    logits, indices = given["logits"], given["indices"]
    rows, k = indices.shape
    scored, mine, item = scored_rows(given["valid"]), _mine(given), logits.element_size()
    read = rows * 9 + scored * (logits.shape[1] * item + k * indices.element_size()) + mine * 4
    written = (logits.numel() + mine) * given["gradient"].element_size()
    return Cost(read, written, bytes_of(*given.values()), 0, 4 * logits.numel())


COSTS = {
    "soft_targets_kernel": _one,
    "soft_targets_own_kernel": _own,
    "soft_targets_halves_kernel": _halves,
    "soft_targets_close_kernel": _close,
    "soft_targets_outcomes_kernel": _outcomes,
    "soft_targets_spread_kernel": _spread,
    "cross_entropy_kernel": CROSS_ENTROPY["cross_entropy_kernel"],  # within the head's loss
}
