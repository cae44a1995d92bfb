"""Calls of map distillation that kernels are tested with, and what they must give: autograd over whole maps, in fp64.

Shapes: B batch, H student heads, G teacher heads for each, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Dilated, Window
from headway.kernels.attention.slopes import Distances, Slopes, block_of
from headway.kernels.maps.operands import Scores, Seen

LOSSES = ("kl", "reverse_kl", "js", "mse", "scores")


class Case(NamedTuple):
    """Operands."""

    teacher: Scores
    student: Scores
    seen: Seen


class Found(NamedTuple):
    """Sums [B], and gradients of a weighted sum of them: of the student's queries, keys and, if learned, bias."""

    sums: Tensor
    gradients: tuple[Tensor, ...]


def drawn(
    mask: Mask = Mask(False),
    pairs: Tensor | None = None,
    heads: tuple[int, int] = (2, 2),
    teacher_heads: tuple[int, int] = (2, 2),
    lengths: tuple[int, int] = (50, 50),
    dims: tuple[int, int] = (32, 24),
    biases: tuple[str | None, str | None] = (None, None),
    batch: int = 2,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Drawn operands; heads are those of queries and of keys. They are [B, S, H, D] in memory, as projections give."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw)

    models = []
    for (h, k), dim, bias in zip((teacher_heads, heads), dims, biases, strict=True):
        q, keys = (
            some(batch, length, n, dim).to(dtype).transpose(1, 2)
            for n, length in zip((h, k), lengths, strict=True)
        )
        added = None
        if bias == "slopes":
            added = Slopes(torch.rand(h, generator=draw), *(torch.arange(length) for length in lengths))
        elif bias == "distances":
            added = Distances.whole(some(h, 2 * lengths[0] - 1), lengths[0])
        elif bias == "shared":
            added = some(1, *lengths).expand(h, *lengths)
        elif bias == "learned":
            added = some(h, *lengths)
        models.append(Scores(q, keys, dim**-0.5, added))
    return Case(models[0], models[1], Seen(mask, pairs))


def _documents(lengths: list[list[int]], total: int) -> Tensor:
    """Documents of so many tokens, one after the other, then padding."""
    rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor([row + [-1] * (total - len(row)) for row in rows])


def _pairs() -> Tensor:
    """Any pairs, the same for all samples; one row sees nothing."""
    pairs = torch.rand(1, 1, 50, 50, generator=torch.Generator().manual_seed(1)) < 0.5
    pairs[:, :, 33] = False
    return pairs


HIDDEN = "other keys, all hidden from one sample"
_CROSS = Mask(False, _documents([[40], [30]], 40), _documents([[45], []], 50))
CASES: dict[str, Callable[[], Case]] = {
    "whole": lambda: drawn(lengths=(70, 70), heads=(1, 1), teacher_heads=(1, 1), batch=1),
    "causal, grouped keys": lambda: drawn(Mask(), heads=(4, 2), teacher_heads=(4, 1), batch=1),
    "documents and padding": lambda: drawn(Mask(False, _documents([[20, 25], [50]], 50))),
    "causal documents": lambda: drawn(Mask(True, _documents([[20, 25], [3]], 50))),
    HIDDEN: lambda: drawn(_CROSS, lengths=(40, 50)),
    "one query": lambda: drawn(lengths=(1, 70), batch=1),
    "prefix": lambda: drawn(Mask(True, prefix=torch.tensor([0, 40]))),
    "window": lambda: drawn(Mask(False, scope=Window(9)), lengths=(100, 100), batch=1),
    "causal window behind a prefix": lambda: drawn(
        Mask(True, prefix=torch.tensor([60]), scope=Window(20)), lengths=(100, 100), batch=1
    ),
    "another scope": lambda: drawn(Mask(scope=Dilated(4, 3)), batch=1),
    "part of a sequence": lambda: drawn(Mask(shift=-20), lengths=(40, 60), batch=1),
    "part of a sequence, all seen": lambda: drawn(Mask(False, shift=-20), lengths=(20, 40), batch=1),
    "pairs and causality": lambda: drawn(Mask(), _pairs()),
    "averaged teacher heads": lambda: drawn(Mask(), teacher_heads=(6, 2), batch=1),
    "slopes and a learned bias": lambda: drawn(Mask(), biases=("slopes", "learned")),
    "a shared bias and slopes": lambda: drawn(Mask(False), biases=("shared", "slopes"), batch=1),
    "biases by distance": lambda: drawn(Mask(), biases=("distances", "slopes"), batch=1),
    "fp16": lambda: drawn(Mask(), dtype=torch.float16, batch=1),
}


_EVERY_LOSS = (
    "whole",
    "documents and padding",
    "averaged teacher heads",
    "other keys, all hidden from one sample",
)


def losses_of(name: str) -> tuple[str, ...]:
    """What a case is computed with: masks are read by the same code for all losses, but `kl` has a kernel of its own,
    and `mse` counts keys."""
    return LOSSES if name in _EVERY_LOSS else ("kl", "mse")


def weights(case: Case) -> Tensor:
    """What the samples' sums are weighted by, [B]."""
    return torch.arange(1, len(case.student.q) + 1, device=case.student.q.device) / 2


def compute(sums: Callable[..., Tensor], case: Case, loss: str) -> Found:
    """What a kernel gives."""
    student = Scores(*(wanting(x) for x in case.student))
    found = sums(case.teacher, student, loss, case.seen, case.seen.rows(student))
    inputs = [x for x in student if isinstance(x, Tensor)]
    return Found(found.detach(), torch.autograd.grad(found @ weights(case).to(found.dtype), inputs))


def wanting(x):
    """A tensor as one that wants a gradient; anything else as it is."""
    return x.detach().requires_grad_() if isinstance(x, Tensor) else x


def expected(case: Case, loss: str) -> Found:
    """The same the usual way, from maps in fp64."""
    return compute(_usual, Case(*(_wide(x) for x in case[:2]), case.seen), loss)


def _wide(scores: Scores) -> Scores:
    return Scores(*(x.double() if isinstance(x, Tensor) else x for x in scores))


def _scores(model: Scores) -> Tensor:
    q, k, scale, bias = model
    found = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return found if bias is None else found + block_of(bias)


_HIDDEN = -1e4  # e^-10000 is 0, and 0 times differences of such logarithms too


def _usual(teacher: Scores, student: Scores, loss: str, seen: Seen, rows: Tensor | None) -> Tensor:
    s, t = _scores(student), _scores(teacher).unflatten(1, (student.q.shape[1], -1))
    ok = torch.ones(s.shape[-2:], dtype=torch.bool) if (found := seen.block(student)) is None else found
    counts = torch.ones(len(s), s.shape[2], dtype=torch.bool) if rows is None else rows
    n = ok.sum(-1).clamp(min=1)
    log_q = torch.where(ok, s, _HIDDEN).log_softmax(-1)
    log_p = torch.where(ok.unsqueeze(-3), t, _HIDDEN).log_softmax(-1).logsumexp(2) - math.log(t.shape[2])
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)

    if loss == "kl":
        value = kl(log_p, log_q)
    elif loss == "reverse_kl":
        value = kl(log_q, log_p)
    elif loss == "js":
        value = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    elif loss == "mse":
        value = F.mse_loss(log_q.exp(), log_p.exp(), reduction="none").sum(-1) / n
    else:
        value = torch.where(ok, F.mse_loss(s, t.mean(2), reduction="none"), 0).sum(-1) / n
    return torch.where(counts.unsqueeze(1), value, 0).mean(1).sum(1)


def largest_score(case: Case) -> float:
    """The largest sum of absolute values that a score is made of: what its rounding is relative to."""
    models = [_wide(Scores(x.q.abs(), x.k.abs(), x.scale, x.bias)) for x in case[:2]]
    return max(float(_scores(x).abs().max()) for x in models)
