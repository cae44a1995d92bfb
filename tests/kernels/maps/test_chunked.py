"""Blocks of maps: their sizes, what they hold, how they round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.kernels.map_distillation import map_distillation_loss, map_distillation_sums
from headway.kernels.maps.divergences import DIVERGENCES
from headway.tests.kernels.maps.usual import FP64, HIDDEN, documents, draw, four, padding, scores

LOSSES = list(DIVERGENCES)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("length", [1, 127, 300])
def test_blocks(length: int, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that are no multiple of a block's; several samples, or a part of the heads, in a block."""
    torch.manual_seed(0)
    inputs = four(teacher=(6, 3, 4), student=(3, 3, 4), queries=length, keys=length, batch=3)
    arguments = {"mask": Mask(True, documents(3, length), scope=Window(150)), "loss": loss}
    want = map_distillation_sums(*inputs, kernel="reference", **arguments)
    grads = torch.autograd.grad(want.loss_B.sum(), inputs[2:])
    for size in (1, 2 * 128 * 300, 1 << 18):
        monkeypatch.setattr("headway.kernels.maps.walk.SIZE", size)
        found = map_distillation_sums(*inputs, kernel="chunked", **arguments)
        FP64(found, want)
        FP64(torch.autograd.grad(found.loss_B.sum(), inputs[2:]), grads)
        with torch.no_grad():
            FP64(map_distillation_sums(*inputs, kernel="chunked", **arguments), want)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck(loss: str) -> None:
    """By sample: what comes in may differ between samples, which share a bias."""
    torch.manual_seed(0)
    qt, kt, qs, ks = four(student=(2, 1, 3), queries=5, keys=5)

    def compute(q: Tensor, k: Tensor, bias: Tensor) -> Tensor:
        return map_distillation_sums(qt, kt, q, k, loss=loss, mask=padding(2, 5), student_bias=bias).loss_B

    assert torch.autograd.gradcheck(compute, (qs, ks, draw(2, 5, 5, grad=True)))


def test_only_one_operand_learns() -> None:
    qt, kt, qs, ks = four()
    both = torch.autograd.grad(map_distillation_loss(qt, kt, qs, ks), (qs, ks))
    (dq,) = torch.autograd.grad(map_distillation_loss(qt, kt, qs, ks.detach()), qs)
    (dk,) = torch.autograd.grad(map_distillation_loss(qt, kt, qs.detach(), ks), ks)
    FP64((dq, dk), both)


class Largest(TorchDispatchMode):
    """Remembers the most numbers that a tensor held, of all that operators returned."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [
            x.untyped_storage().nbytes() // x.itemsize for x in tree_flatten(out)[0] if isinstance(x, Tensor)
        ]
        self.most = max([self.most, *found])
        return out


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_map_is_held(loss: str, causal: bool) -> None:
    length = 2048
    inputs = [draw(1, 1, length, 8, dtype=torch.float32, grad=i > 1) for i in range(4)]
    with Largest() as ours:
        map_distillation_loss(*inputs, loss=loss, causal=causal).backward()
    assert ours.most <= length * 256  # a block, of which there are eight
    with Largest() as theirs:
        map_distillation_loss(*inputs, loss=loss, causal=causal, kernel="reference")
    assert theirs.most >= length * length


def test_compiled_callers() -> None:
    inputs = four()
    compiled = torch.compile(map_distillation_loss, backend="eager")
    FP64(compiled(*inputs, causal=True), map_distillation_loss(*inputs, causal=True))


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_that_underflow(loss: str) -> None:
    """Scores far apart in fp32, as from ALiBi over long rows: all finite, and what fp64 says.

    A log-weight of fp32 is wrong by 2^-24 of what it is the difference of, at most 400 here: 2.4e-5, of weights that
    sum to 1. `scores` has squares of that size instead.
    """
    torch.manual_seed(0)
    inputs = four(queries=200, keys=200)
    narrow = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
    bias = -2.0 * (torch.arange(200) - torch.arange(200)[:, None]).abs().expand(2, -1, -1)
    a = map_distillation_loss(*narrow, loss=loss, teacher_bias=bias, student_bias=0.5 * bias)
    b = map_distillation_loss(*inputs, loss=loss, teacher_bias=bias, student_bias=0.5 * bias)
    torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2.4e-5)
    for x, y in zip(torch.autograd.grad(a, narrow[2:]), torch.autograd.grad(b, inputs[2:]), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-4, atol=2.4e-5)


def test_narrow_products() -> None:
    """bf16 against fp64 of the same operands.

    Half a unit of bf16 is u = 2^-9. A score is a product rounded once, wrong by u |s|, hence a log-weight by
    2 u max|s| and the loss by 4 u max|s| (mean of p times two of these). A row's slope q - p is wrong by
    2 u max|s| (p + q), and its products by 3 u |q - p| more: its own rounding, a block's product and the result's.
    """
    torch.manual_seed(0)
    narrow = [draw(2, 2, 150, 64, dtype=torch.bfloat16, grad=g) for g in (False, False, True, True)]
    exact = [x.detach().double().requires_grad_(x.requires_grad) for x in narrow]
    ours, theirs = (map_distillation_loss(*x, causal=True) for x in (narrow, exact))
    assert ours.dtype == torch.float32
    u, scale = 2**-9, 1 / 8
    with torch.no_grad():
        t, s = scores(*exact[:2], None, None), scores(*exact[2:], None, None)
        most = max(t.abs().max(), s.abs().max()).item()
        past = torch.ones(150, 150, dtype=torch.bool).triu(1)
        p, q = (torch.softmax(x.masked_fill(past, HIDDEN), -1) for x in (t, s))
        wrong = (2 * u * most * (p + q) + 3 * u * (q - p).abs()) * scale / (4 * 150)
        bounds = wrong @ exact[3].abs(), wrong.mT @ exact[2].abs()
    assert abs(ours.item() - theirs.item()) <= 4 * u * most
    grads = torch.autograd.grad(ours, narrow[2:]), torch.autograd.grad(theirs, exact[2:])
    for a, b, bound in zip(*grads, bounds, strict=True):
        assert a.dtype == torch.bfloat16
        assert ((a.double() - b).abs() <= bound).all()
    wide = [x.detach().float().requires_grad_(x.requires_grad) for x in narrow]
    with torch.autocast("cpu", torch.bfloat16):
        cast = map_distillation_loss(*wide, causal=True)
    assert torch.equal(cast, ours)
    assert torch.equal(torch.autograd.grad(cast, wide[2])[0], grads[0][0].float())
