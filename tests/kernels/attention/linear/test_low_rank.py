"""Linformer against its equation, and against the package linformer."""

import math

import pytest
import torch

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.linear import low_rank
from headway.kernels.attention.masks import Mask
from headway.tests import oracles
from headway.tests.kernels.attention.linear.sequences import KEYS, Largest, heads, value_and_gradients

PADDED = torch.tensor([[0] * 290 + [-1] * 13, [3] * 170 + [-1] * 133])
MASKS = {
    "full": Mask(False),
    "padded": Mask(False, PADDED),
    "cross": Mask(False),
    "cross padded": Mask(False, torch.zeros(2, 105, dtype=torch.int64), PADDED),
}


def projections(dtype=torch.float64, keys=KEYS + 9):
    generator = torch.Generator().manual_seed(4)
    made = (torch.randn(4, 12, keys, generator=generator, dtype=torch.float64) / 6 for _ in range(2))
    given = dict(
        zip(("project_keys", "project_values"), (x.to(dtype).requires_grad_() for x in made), strict=True)
    )
    return {"rank": 12, **given}


def inputs_of(mask, dtype=torch.float64):
    return heads("cross" if "cross" in mask else "causal", dtype=dtype)


def test_reference_is_the_equation():
    q, k, v = inputs_of("padded")
    own = projections()
    out = low_rank.reference(q, k, v, MASKS["padded"], **own)
    for b, h, i in [(0, 0, 0), (1, 3, 200), (1, 2, 100)]:
        real = int((PADDED[b] >= 0).sum())  # padding comes last
        keys = own["project_keys"][h, :, :real] @ k[b, h // 2, :real]
        values = own["project_values"][h, :, :real] @ v[b, h // 2, :real]
        expected = torch.softmax(keys @ q[b, h, i] / math.sqrt(20), 0) @ values
        torch.testing.assert_close(out[b, h, i], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [40, 33])
def test_reference_is_the_packages(tokens):
    theirs = oracles.file("linformer/linformer.py", ("linformer", "linformer.reversible"))
    torch.manual_seed(0)
    layer = theirs.LinformerSelfAttention(24, 40, k=12, heads=4).double()
    layer.to_out.weight.data, layer.to_out.bias.data = torch.eye(24).double(), torch.zeros(24).double()
    x = torch.randn(2, tokens, 24, dtype=torch.float64, requires_grad=True)
    q, k, v = (f(x).unflatten(-1, (4, 6)).transpose(1, 2) for f in (layer.to_q, layer.to_k, layer.to_v))
    e, f = (p.T.expand(4, -1, -1) for p in (layer.proj_k, layer.proj_v))
    ours = low_rank.reference(q, k, v, Mask(False), rank=12, project_keys=e, project_values=f)
    ours, expected = ours.transpose(1, 2).flatten(2), layer(x)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    given = (x, layer.proj_k, layer.proj_v)
    slopes = [torch.autograd.grad(y.square().sum(), given, retain_graph=True) for y in (ours, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", MASKS)
def test_fast_is_the_reference(mask):
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
        ours, theirs = (
            value_and_gradients(f, inputs_of(mask, dtype), MASKS[mask], scale=0.2, **projections(dtype))
            for f in (low_rank.attention, low_rank.reference)
        )
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)  # fp32: sums of 303 terms


def test_padding_is_as_if_it_were_not_there():
    q, k, v = inputs_of("padded")
    own, mask = projections(), MASKS["padded"]
    alone = low_rank.attention(q[1:, :, :170], k[1:, :, :170], v[1:, :, :170], Mask(False), **own)
    torch.testing.assert_close(low_rank.attention(q, k, v, mask, **own)[1:, :, :170], alone)


def test_dropout_is_the_references():
    key = torch.tensor(random.key(0, "attention"))
    drop = WeightDropout(0.25, key, torch.tensor([7, 3]), torch.arange(KEYS), first_head=4)
    ours, theirs, plain = (
        value_and_gradients(f, inputs_of("full"), Mask(False), dropout=d, **projections())
        for f, d in ((low_rank.attention, drop), (low_rank.reference, drop), (low_rank.attention, None))
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    assert not torch.allclose(ours[0], plain[0])


def test_gradients_are_those_of_finite_differences():
    q, k, v = (x[:1, :, :11, :3].detach().requires_grad_() for x in heads())
    own = projections(keys=13)

    def compute(q, k, v, e, f):
        return low_rank.attention(q, k, v, Mask(False), rank=12, project_keys=e, project_values=f)

    given = (q, k, v, own["project_keys"], own["project_values"])
    assert torch.autograd.gradcheck(compute, given, fast_mode=True)


def test_bf16_is_as_good_as_bf16_can_be():
    inputs, own = inputs_of("full", torch.bfloat16), projections(torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = {n: x.detach().double().requires_grad_() if n != "rank" else x for n, x in own.items()}
    ours = value_and_gradients(low_rank.attention, inputs, Mask(False), **own)
    theirs = value_and_gradients(low_rank.reference, exact, Mask(False), **wide)
    for got, want in zip(ours, theirs, strict=True):
        # Each of four roundings in a chain (projection, scores, weights, output) is off by at most 2^-9 relative;
        # PyTorch's bf16 backward on CPU loses another digit.
        assert (got.double() - want).norm() / want.norm() < 4 * 2**-7


def test_memory_grows_with_the_length():
    q, k, v = (torch.randn(1, 2, 4096, 8, requires_grad=True) for _ in range(3))
    own = {n: torch.randn(2, 64, 4096, requires_grad=True) for n in ("project_keys", "project_values")}
    with Largest() as largest:
        low_rank.attention(q, k, v, Mask(False), rank=64, **own).sum().backward()
    assert largest.elements <= 2 * 64 * 4096  # E and F themselves
