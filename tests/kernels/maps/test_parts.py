"""Keys in parts: what a ring over ranks adds up."""

from __future__ import annotations

import math

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.map_distillation import map_distillation_sums
from headway.kernels.maps import parts
from headway.kernels.maps.divergences import DIVERGENCES
from headway.kernels.maps.gradients import Wanted
from headway.kernels.maps.operands import Scores, Seen
from headway.parallel.context.ring import narrowed
from headway.tests.kernels.maps.usual import BATCH, FP64, LENGTH, SQUARE, draw, four

LOSSES = list(DIVERGENCES)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    "name", ["whole", "causal", "padding", "documents", "window", "window, causal", "prefix"]
)
def test_parts_of_keys(name: str, loss: str) -> None:
    """Two runs of keys, merged as a ring over ranks merges them, are the whole."""
    torch.manual_seed(0)
    qt, kt, qs, ks = four(teacher=(4, 2, 8))
    arguments = SQUARE[name]
    whole = map_distillation_sums(qt, kt, qs, ks, loss=loss, kernel="reference", **arguments)
    want = torch.autograd.grad(whole.loss_B.sum(), (qs, ks))
    mask = arguments.get("mask", Mask(arguments.get("causal", False)))
    mask = mask if isinstance(mask, Mask) else Mask(False, torch.where(mask, 0, -1))
    pieces = []
    for keys in (range(16), range(16, LENGTH)):
        at = slice(keys.start, keys.stop)
        teacher, student = (Scores(q, k[:, :, at], 1 / math.sqrt(8)) for q, k in ((qt, kt), (qs, ks)))
        pieces.append((teacher, student, Seen(narrowed(mask, range(LENGTH), keys))))
    lse_t, lse_s = (
        torch.logaddexp(*(parts.log_sums(piece[which], piece[2]) for piece in pieces)) for which in (0, 1)
    )
    count = sum(parts.seen_keys(student, seen) for _, student, seen in pieces)
    terms = [parts.part_terms(t, s, loss, seen, lse_t, lse_s) for t, s, seen in pieces]
    value, centre = (sum(x) for x in zip(*terms, strict=True))
    counts = torch.ones(BATCH, LENGTH) if mask.documents is None else mask.documents >= 0
    share = counts[:, None].double() / (count.clamp(min=1) if DIVERGENCES[loss].mean else 1) / qs.shape[1]
    share = share.expand_as(value)
    FP64((value * share).sum((1, 2)), whole.loss_B)
    found = [parts.part_gradients(t, s, loss, seen, lse_t, lse_s, centre, share) for t, s, seen in pieces]
    FP64(found[0][0] + found[1][0], want[0])
    FP64(torch.cat((found[0][1], found[1][1]), 2), want[1])


def test_bias_of_a_part_and_what_is_wanted() -> None:
    torch.manual_seed(0)
    qt, kt, qs, ks = four()
    bias = draw(2, LENGTH, LENGTH, grad=True)
    teacher, student, seen = Scores(qt, kt, 0.3), Scores(qs, ks, 0.3, bias), Seen(Mask())
    sums = parts.log_sums(teacher, seen), parts.log_sums(student, seen)
    upstream = torch.full((BATCH, 2, LENGTH), 0.5, dtype=torch.float64)
    wanted = Wanted(False, False, True)
    found = parts.part_gradients(
        teacher, student, "kl", seen, *sums, torch.zeros_like(upstream), upstream, wanted
    )
    assert found[:2] == (None, None)
    whole = map_distillation_sums(qt, kt, qs, ks, causal=True, scale=0.3, student_bias=bias)
    FP64(found[2], torch.autograd.grad(whole.loss_B.sum(), bias)[0])
