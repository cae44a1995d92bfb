"""Linear attention and gated linear attention against the papers' recurrences, and other people's code."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.attention.linear import featured, gated, linear
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

PERFORMER = (
    "performer_pytorch/performer_pytorch.py",
    ("local_attention", "axial_positional_embedding", "performer_pytorch", "performer_pytorch.reversible"),
)


@pytest.fixture(params=[None, 3])
def segments(request, monkeypatch):
    """Whole rows in a segment, and segments of a chunk or few."""
    if request.param:
        monkeypatch.setitem(featured.SEGMENT, "cpu", 2**14)


def gate(mask="causal", strength=1.0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    made = strength * torch.randn(2, 4, KEYS, 20, generator=generator, dtype=torch.float64)
    return made.to(dtype).requires_grad_()


def test_linear_is_the_recurrence():
    q, k, v = heads("documents")
    out = linear.reference(q, k, v, MASKS["documents"])
    phi = [F.elu(x) + 1 for x in (q, k)]
    for b, h, i in [(0, 0, 0), (0, 3, 120), (1, 2, 200), (1, 1, 255)]:
        state, total = torch.zeros(20, 20, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)
        for j in range(i + 1):
            if MASKS["documents"].documents[b, j] == MASKS["documents"].documents[b, i]:
                state = state + torch.outer(phi[1][b, h // 2, j], v[b, h // 2, j])
                total = total + phi[1][b, h // 2, j]
        expected = phi[0][b, h, i] @ state / (phi[0][b, h, i] @ total)
        torch.testing.assert_close(out[b, h, i], expected, rtol=1e-12, atol=1e-12)


def test_linear_is_performer_pytorchs_and_flas():
    q, k, v = heads(keys=4, length=192)
    phi = [F.elu(x) + 1 for x in (q, k)]
    theirs = oracles.file(*PERFORMER)
    sides = {
        False: theirs.linear_attention(*phi, v),
        True: theirs.causal_linear_attention_noncuda(*phi, v, eps=0),
    }
    for causal, expected in sides.items():
        ours = linear.reference(q, k, v, Mask(causal))
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)  # fp64, sums of 192 terms
        upstream = torch.randn_like(ours)
        slopes = [torch.autograd.grad(y, (q, k, v), upstream, retain_graph=True) for y in (ours, expected)]
        torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-10)
    fla = oracles.file("fla/ops/linear_attn/naive.py").naive_chunk_linear_attn
    expected = fla(*(x.transpose(1, 2) for x in (*phi, v)), normalize=True).transpose(1, 2)
    # It adds 1e-10 to a denominator that is some hundred times the scale it multiplies queries by.
    torch.testing.assert_close(linear.reference(q, k, v, Mask()), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("mask", MASKS)
def test_linear_by_chunks_is_the_reference(mask, scale, segments):
    for dtype, bound in ((torch.float64, 1e-11), (torch.float32, 2e-4)):
        # fp32: roundings of 2^-24 in sums of up to 303 terms, in another order, and gradients up to 10.
        ours, theirs = (
            value_and_gradients(f, heads(mask, dtype=dtype), MASKS[mask], scale=scale)
            for f in (linear.attention, linear.reference)
        )
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


def test_weights_average_values():
    for name, mask in MASKS.items():
        q, k, v = heads(name)
        out = linear.weights(q, k, mask) @ v.repeat_interleave(2, 1)
        torch.testing.assert_close(out, linear.reference(q, k, v, mask))


def test_a_query_that_sees_nothing_gets_zero():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        inputs = heads("cross documents", dtype=dtype)
        for f in (linear.attention, linear.reference):
            out, *slopes = value_and_gradients(f, inputs, MASKS["cross documents"])
            assert not out[0, :, 100:].any()
            assert out[:, :, :100].any(-1).all()
            assert not slopes[0][0, :, 100:].any()
            assert all(s.isfinite().all() for s in slopes)


def test_gla_is_flas_recurrence():
    q, k, v = heads(keys=4, length=67)
    log = F.logsigmoid(gate()[:, :, :67]) / 16
    fla = oracles.file("fla/ops/gla/naive.py").naive_recurrent_gla
    expected = fla(*(x.transpose(1, 2) for x in (q, k, v, log)))[0].transpose(1, 2)
    ours = gated.reference(q, k, v, Mask(), decay=gate()[:, :, :67])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)  # theirs is fp32, sums of 67 x 20 terms
    slopes = [torch.autograd.grad(y.square().sum(), (q, k, v), retain_graph=True) for y in (ours, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


def test_gla_reads_what_gates_kept():
    q, k, v = heads("documents")
    decay, mask = gate(strength=3.0), MASKS["documents"]
    out = gated.reference(q, k, v, mask, decay=decay)
    for b, h, i in [(0, 0, 100), (0, 3, 131), (1, 2, 300)]:
        expected = torch.zeros(20, dtype=torch.float64)
        for j in range(i + 1):
            if mask.documents[b, j] == mask.documents[b, i]:
                passed = torch.sigmoid(decay[b, h, j + 1 : i + 1]).pow(1 / 16).prod(0)
                expected = (
                    expected + (q[b, h, i] * passed) @ k[b, h // 2, j] / math.sqrt(20) * v[b, h // 2, j]
                )
        torch.testing.assert_close(out[b, h, i], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("strength", [1.0, 300.0])
@pytest.mark.parametrize("mask", FORWARD)
def test_gla_by_chunks_is_the_reference(mask, strength, segments):
    # A strength of 300 forgets by up to e^-60 a token: e^-4000 in a chunk, which no float holds.
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 3e-4)):
        ours, theirs = (
            value_and_gradients(
                f, heads(mask, dtype=dtype), MASKS[mask], decay=gate(mask, strength, dtype), scale=0.3
            )
            for f in (gated.attention, gated.reference)
        )
        # fp32: sums of up to 303 x 20 terms of 2^-24 each, of numbers up to 50.
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("length", [1, 2, 5, 63, 65])
def test_short_rows(length):
    q, k, v = heads(length=length)
    decay = gate()[:, :, :length]
    torch.testing.assert_close(linear.attention(q, k, v, Mask()), linear.reference(q, k, v, Mask()))
    ours, theirs = (f(q, k, v, Mask(), decay=decay) for f in (gated.attention, gated.reference))
    torch.testing.assert_close(ours, theirs)


def test_gradients_are_those_of_finite_differences(monkeypatch):
    monkeypatch.setattr(featured, "CHUNK", 4)
    monkeypatch.setattr(gated, "CHUNK", 4)
    monkeypatch.setitem(featured.SEGMENT, "cpu", 1)
    documents = torch.tensor([[0] * 3 + [1] * 7 + [-1]])
    q, k, v, decay = (torch.randn(1, 2, 11, 3, dtype=torch.float64, requires_grad=True) for _ in range(4))
    for mask in (Mask(), Mask(True, documents), Mask(False, documents), Mask(False)):
        assert torch.autograd.gradcheck(lambda *x, m=mask: linear.attention(*x, m), (q, k, v), fast_mode=True)
    for mask in (Mask(), Mask(True, documents)):
        compute = lambda q, k, v, g, m=mask: gated.attention(q, k, v, m, decay=g)  # noqa: E731
        assert torch.autograd.gradcheck(compute, (q, k, v, decay), fast_mode=True)


def test_bf16_is_as_good_as_its_inputs():
    inputs, decay = heads(dtype=torch.bfloat16), gate(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (*inputs, decay)]
    for module, own in ((linear, {}), (gated, {"decay": decay})):
        ours = value_and_gradients(module.attention, inputs, Mask(), **own)
        wide = {"decay": exact[3]} if own else {}
        theirs = value_and_gradients(module.reference, exact[:3], Mask(), **wide)
        for got, want in zip(ours, theirs, strict=True):
            # Sums are fp32: what is rounded are the upstream gradient and the result, by 2^-9 relative each.
            assert (got.double() - want).norm() / want.norm() < 2**-8


@pytest.mark.parametrize("module", [linear, gated])
def test_autocast_leaves_sums_alone(module):
    inputs = heads(dtype=torch.float32)
    own = {"decay": gate(dtype=torch.float32)} if module is gated else {}
    expected = module.attention(*inputs, MASKS["documents"], **own)
    with torch.autocast("cpu", torch.bfloat16):
        for f in (module.attention, module.reference):
            torch.testing.assert_close(f(*inputs, MASKS["documents"], **own), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mask", ["causal", "documents", "pairs", "full", "gla"])
def test_memory_grows_with_the_length(mask, monkeypatch):
    monkeypatch.setitem(featured.SEGMENT, "cpu", 2**15)
    length, dim = 2048, 16
    q, k, v, decay = (torch.randn(1, 2, length, dim, requires_grad=True) for _ in range(4))
    documents = (torch.arange(length) // 300)[None] if mask in ("documents", "pairs") else None
    with Largest() as largest, kept() as found:
        if mask == "gla":
            out = gated.attention(q, k, v, Mask(), decay=decay)
        else:
            out = linear.attention(q, k, v, Mask(mask in ("causal", "documents"), documents))
        out.sum().backward()
    # Pairs of a segment's chunks, and values beside their ones.
    assert largest.elements <= max(2**15 // dim * 128, 2 * length * (dim + 8))
    # Queries, keys, values and ones, sums, the divided, and for each segment a state.
    assert sum(found.values()) <= 10 * 2 * length * (dim + 8)


@pytest.mark.long
@pytest.mark.parametrize("causal", [True, False])
def test_it_compiles(causal, monkeypatch):
    monkeypatch.setattr(featured, "CHUNK", 16)
    monkeypatch.setattr(gated, "CHUNK", 8)
    torch.compiler.reset()
    inputs, mask = heads(length=40), Mask(causal, torch.tensor([[0] * 20 + [1] * 20] * 2))
    for module, own in ((linear, {}), (gated, {"decay": gate()[:, :, :40]})):
        if module is linear or causal:
            compute = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
            ours, theirs = (value_and_gradients(f, inputs, mask, **own) for f in (compute, module.reference))
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
