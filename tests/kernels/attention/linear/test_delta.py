"""The gated delta rule against its recurrence in matrices, and against flash-linear-attention's code."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.attention.linear import delta, featured
from headway.kernels.attention.masks import Mask
from headway.tests import oracles
from headway.tests.kernels.attention.linear.sequences import (
    FORWARD,
    KEYS,
    MASKS,
    Largest,
    heads,
    kept,
    value_and_gradients,
)


@pytest.fixture(params=[None, 3])
def segments(request, monkeypatch):
    """Whole rows in a segment, and segments of a chunk."""
    if request.param:
        monkeypatch.setitem(featured.SEGMENT, "cpu", 2**14)


def gates(length=KEYS, strength=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    shapes = {
        "beta": (2, 4, length, 1),
        "decay": (2, 4, length, 1),
        "decay_rate": (4,),
        "decay_shift": (4,),
    }
    made = {
        name: torch.randn(s, generator=generator, dtype=torch.float64) * (strength if name == "decay" else 1)
        for name, s in shapes.items()
    }
    return {name: x.to(dtype).requires_grad_() for name, x in made.items()}


def log_decay(own):
    soft = F.softplus(own["decay"] + own["decay_shift"][:, None, None])
    return -own["decay_rate"].exp()[:, None, None] * soft


def test_reference_is_the_equation():
    q, k, v = heads("documents")
    own, mask = gates(), MASKS["documents"]
    out = delta.reference(q, k, v, mask, **own)
    log, beta = log_decay(own), own["beta"].sigmoid()
    for b, h, first, i in [(0, 0, 0, 20), (0, 3, 100, 131), (1, 2, 128, 150)]:
        state = torch.zeros(20, 20, dtype=torch.float64)  # values by keys, as the paper writes it
        for t in range(first, i + 1):
            key = k[b, h // 2, t] / k[b, h // 2, t].norm()
            forget = torch.eye(20, dtype=torch.float64) - beta[b, h, t] * torch.outer(key, key)
            write = beta[b, h, t] * torch.outer(v[b, h // 2, t], key)
            state = log[b, h, t].exp() * state @ forget + write
        expected = state @ q[b, h, i] / q[b, h, i].norm() / math.sqrt(20)
        torch.testing.assert_close(out[b, h, i], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
def test_reference_is_flas(name):
    q, k, v = heads(keys=4, length=131)
    own = gates(131)
    theirs = getattr(oracles.file("fla/ops/gated_delta_rule/naive.py"), name)
    unit = [F.normalize(x, dim=-1).transpose(1, 2) for x in (q, k)]
    log, beta = (x.squeeze(-1).transpose(1, 2) for x in (log_decay(own), own["beta"].sigmoid()))
    expected = theirs(*unit, v.transpose(1, 2), beta=beta, g=log)[0].transpose(1, 2).double()
    for f in (delta.reference, delta.attention):
        ours = f(q, k, v, Mask(), **own)
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)  # theirs is fp32
        given = (q, k, v, *own.values())
        slopes = [torch.autograd.grad(y.square().sum(), given, retain_graph=True) for y in (ours, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [1.0, 100.0])
@pytest.mark.parametrize("mask", FORWARD)
def test_chunks_are_the_reference(mask, strength, segments):
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        ours, theirs = (
            value_and_gradients(
                f, heads(mask, dtype=dtype), MASKS[mask], scale=0.5, **gates(strength=strength, dtype=dtype)
            )
            for f in (delta.attention, delta.reference)
        )
        # fp32: sums of up to 2 x 303 x 20 terms of 2^-24 each, of numbers up to 10.
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("length", [1, 2, 63, 65])
def test_short_rows(length):
    inputs, own = heads(length=length), gates(length)
    ours, theirs = (f(*inputs, Mask(), **own) for f in (delta.attention, delta.reference))
    torch.testing.assert_close(ours, theirs)


def test_the_same_key_again_and_again():
    """A whole chunk writes under one key, nothing is forgotten: the triangular system is as ill as it can be."""
    q, k, v = heads(dtype=torch.float32)
    k = k[:, :, :1].expand(k.shape)
    own = gates(dtype=torch.float32) | {
        "beta": torch.full((2, 4, KEYS, 1), 9.0),
        "decay": torch.full((2, 4, KEYS, 1), -30.0),
    }
    ours = delta.attention(q, k, v, Mask(), **own)
    exact = delta.reference(
        q.double(), k.double(), v.double(), Mask(), **{n: x.double() for n, x in own.items()}
    )
    torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-4)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", 4)
    monkeypatch.setitem(featured.SEGMENT, "cpu", 1)
    documents = torch.tensor([[0] * 3 + [1] * 7 + [-1]])
    inputs = [torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    own = {
        n: (x[:1, :2, :11] if x.dim() == 4 else x[:2]).detach().requires_grad_() for n, x in gates().items()
    }
    for mask in (Mask(), Mask(True, documents)):

        def compute(q, k, v, *given, mask=mask):
            return delta.attention(q, k, v, mask, **dict(zip(own, given, strict=True)))

        assert torch.autograd.gradcheck(compute, (*inputs, *own.values()), fast_mode=True)


def test_bf16_is_as_good_as_its_inputs():
    inputs, own = heads(dtype=torch.bfloat16), gates(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    wide = {n: x.detach().double().requires_grad_() for n, x in own.items()}
    ours = value_and_gradients(delta.attention, inputs, Mask(), **own)
    theirs = value_and_gradients(delta.reference, exact, Mask(), **wide)
    for got, want in zip(ours, theirs, strict=True):
        # Sums are fp32: what is rounded are the upstream gradient and the result, by 2^-9 relative each.
        assert (got.double() - want).norm() / want.norm() < 2**-7


def test_autocast_leaves_sums_alone():
    inputs, own = heads(dtype=torch.float32), gates(dtype=torch.float32)
    expected = delta.attention(*inputs, MASKS["documents"], **own)
    with torch.autocast("cpu", torch.bfloat16):
        for f in (delta.attention, delta.reference):
            torch.testing.assert_close(f(*inputs, MASKS["documents"], **own), expected, rtol=1e-4, atol=1e-4)


def test_memory_grows_with_the_length():
    length, dim = 2048, 16
    q, k, v = (torch.randn(2, 4, length, dim, requires_grad=True) for _ in range(3))
    with Largest() as largest, kept() as found:
        delta.attention(q, k, v, Mask(), **gates(length, dtype=torch.float32)).sum().backward()
    assert largest.elements <= 2 * 4 * length * delta.CHUNK
    assert sum(found.values()) <= 2 * 4 * length * (10 * dim + 10)


@pytest.mark.long
def test_it_compiles(monkeypatch):
    monkeypatch.setattr(delta, "CHUNK", 16)
    torch.compiler.reset()
    compute = torch.compile(delta.attention, fullgraph=True, backend="aot_eager")
    inputs, own, mask = heads(length=40), gates(40), Mask(True, torch.tensor([[0] * 20 + [1] * 20] * 2))
    ours, theirs = (value_and_gradients(f, inputs, mask, **own) for f in (compute, delta.reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
