"""Performer and random feature attention: their features, what these estimate, and sums by chunks."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels import random
from headway.kernels.attention import dense
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.linear import featured, features, rfa
from headway.kernels.attention.masks import Mask
from headway.tests import oracles
from headway.tests.kernels.attention.linear.sequences import (
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
KEY = torch.tensor(random.key(0, "blocks.0.attention"))
DRAW = Draw(KEY, torch.tensor(0))


@pytest.fixture(params=[None, 3])
def segments(request, monkeypatch):
    """Whole rows in a segment, and segments of a chunk or few."""
    if request.param:
        monkeypatch.setitem(featured.SEGMENT, "cpu", 2**14)


def deviations(dtype=torch.float64):
    generator = torch.Generator().manual_seed(4)
    return (0.5 + torch.rand(4, 20, generator=generator)).to(dtype).requires_grad_()


def own_of(module, dtype=torch.float64):
    return {"draw": DRAW, "features": 50} | ({"sigma": deviations(dtype)} if module is rfa else {})


def test_directions_are_orthogonal_and_normal():
    w = features.orthogonal_directions(KEY, 3, 40, 16).double()
    for block in w.split(16, 1):
        products = block @ block.mT
        off = products - torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
        assert off.abs().max() < 1e-5  # fp32 of numbers up to 40
    many = features.orthogonal_directions(KEY, 200, 16, 16)
    # 51,200 numbers; squared norms are chi-squared of 16 degrees, with deviation sqrt(32).
    assert abs(many.mean()) < 5 / math.sqrt(51200)
    squares = many.square().sum(-1)
    assert abs(squares.mean() - 16) < 5 * math.sqrt(32 / 3200)
    assert abs(squares.std() / math.sqrt(32) - 1) < 0.1
    spread = torch.einsum("hmd,hme->de", many, many) / 3200
    assert (spread - torch.eye(16)).abs().max() < 5 * math.sqrt(2 / 3200)
    first = many[:, 0] / many[:, 0].norm(dim=-1, keepdim=True)  # no feature of a block leans to a side
    assert first.mean(0).norm() < 5 / math.sqrt(200)


@pytest.mark.parametrize("make", [features.directions, features.orthogonal_directions])
def test_directions_depend_on_head_and_period_alone(make):
    whole = make(KEY, 6, 40, 16)
    assert torch.equal(make(KEY, 2, 40, 16, first_head=3), whole[3:5])
    assert torch.equal(make(KEY, 6, 20, 16), whole[:, :20])
    assert len({tuple(w.flatten().tolist()) for w in whole}) == 6
    for other in (make(KEY, 6, 40, 16, period=torch.tensor(1)), make(KEY + 1, 6, 40, 16)):
        assert (other != whole).float().mean() > 0.99


@pytest.mark.parametrize("module", [features, rfa])
def test_directions_are_drawn_anew(module):
    inputs, own = heads(length=20), own_of(module)

    def at(step, redraw):
        return module.attention(
            *inputs, Mask(), **own | {"draw": Draw(KEY, torch.tensor(step)), "redraw": redraw}
        )

    assert torch.equal(at(0, 10), at(9, 10))
    assert not torch.equal(at(9, 10), at(10, 10))
    assert torch.equal(at(9, 0), at(1000, 0))
    q, k, v = heads(length=20, queries=4, keys=4)
    own["draw"], two = DRAW._replace(first_head=2), slice(2, 4)
    if module is rfa:
        own["sigma"] = own["sigma"][two]
    part = module.attention(q[:, two], k[:, two], v[:, two], Mask(), **own)
    torch.testing.assert_close(part, module.attention(q, k, v, Mask(), **own_of(module))[:, two])


@pytest.mark.parametrize("causal", [True, False])
def test_performer_is_performer_pytorchs(causal):
    q, k, v = heads(keys=4, length=96, dim=16)
    theirs = oracles.file(*PERFORMER)
    w = features.orthogonal_directions(KEY, 4, 40, 16).double()
    found = []
    for h in range(4):
        # Without the epsilon that it adds; it takes one set of directions for all heads.
        one = slice(h, h + 1)
        phi = [
            theirs.softmax_kernel(x[:, one], projection_matrix=w[h], is_query=x is q, eps=0) for x in (q, k)
        ]
        found.append(
            theirs.causal_linear_attention_noncuda(*phi, v[:, one], eps=0)
            if causal
            else theirs.linear_attention(*phi, v[:, one])
        )
    ours = features.reference(q, k, v, Mask(causal), draw=DRAW, features=40)
    torch.testing.assert_close(ours, torch.cat(found, 1), rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(ours)
    slopes = [torch.autograd.grad(y, (q, k, v), upstream) for y in (ours, torch.cat(found, 1))]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


def test_performer_estimates_dense_attention():
    q, k, v = (x.detach() / 2 for x in heads(keys=4, length=64, dim=16))
    theirs = oracles.file(*PERFORMER)
    for mask in (Mask(), Mask(False)):
        exact, off = dense.reference(q, k, v, mask), []
        for count in (64, 256, 1024, 4096):
            estimate = features.attention(q, k, v, mask, draw=DRAW, features=count)
            off.append((estimate - exact).square().mean().sqrt().item())
        # An error of 1 / sqrt(features): a factor 8 in all, of which a half is left for chance and bias.
        assert off[3] < off[0] / 4
        assert off[3] < 0.1
    torch.manual_seed(0)
    other = theirs.FastAttention(16, nb_features=4096).double()
    assert off[3] < 2 * (other(q, k, v) - exact).square().mean().sqrt()


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("module", [features, rfa])
def test_chunks_are_the_reference(module, mask, segments):
    for dtype, bound in ((torch.float64, 1e-9), (torch.float32, 2e-3)):
        ours, theirs = (
            value_and_gradients(f, heads(mask, dtype=dtype), MASKS[mask], scale=0.3, **own_of(module, dtype))
            for f in (module.attention, module.reference)
        )
        # fp32: sums of 303 terms; a denominator that estimates may be a tenth of its terms, and is divided by twice.
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.parametrize("module", [features, rfa])
def test_weights_average_values(module):
    q, k, v = heads("cross documents")
    own, mask = own_of(module), MASKS["cross documents"]
    out = module.weights(q, k, mask, **own) @ v.repeat_interleave(2, 1)
    torch.testing.assert_close(out, module.reference(q, k, v, mask, **own))
    assert not module.attention(q, k, v, mask, **own)[0, :, 100:].any()


def test_no_key_drowns_those_before_it():
    q, k, v = (x.detach().float() for x in heads(keys=4, dim=16, length=300))
    k[:, :, :150] *= 25  # exponents down to some -2,000, where fp32 ends at -87
    k[:, :, 150:] *= 0.1
    own = {"draw": DRAW, "features": 64}
    ours = features.attention(q, k, v, Mask(), **own)
    assert ours.isfinite().all()
    assert (ours.abs() <= v.abs().amax(2, keepdim=True) + 1e-4).all()
    w = features.orthogonal_directions(KEY, 4, 64, 16).double()
    logs = [
        x.double() / 2 @ w.mT - scale * x.double().square().sum(-1, keepdim=True)
        for x, scale in ((q, 0), (k, 1 / 8))
    ]
    for i in (0, 1, 40, 149, 150, 200):
        # Logarithms of weights in fp64, where nothing is lost.
        weights = torch.softmax((logs[0][:, :, i, None] + logs[1][:, :, : i + 1]).logsumexp(-1), -1)
        exact = torch.einsum("bhs,bhsd->bhd", weights, v[:, :, : i + 1].double())
        # Exponents of a thousand have an error of 1e-4 in fp32.
        torch.testing.assert_close(ours[:, :, i].double(), exact, rtol=5e-3, atol=5e-3)
    documents = torch.tensor([[0] * 150 + [1] * 150] * 2)
    for causal in (True, False):
        ours = features.attention(q, k, v, Mask(causal, documents), **own)
        for part in (slice(150), slice(150, 300)):
            alone = (x[:, :, part] for x in (q, k, v))
            torch.testing.assert_close(
                ours[:, :, part], features.attention(*alone, Mask(causal), **own), rtol=1e-3, atol=1e-3
            )


def test_waves_estimate_the_gaussian_kernel():
    q, k, _ = heads(length=9)
    sigma = deviations()
    unit = [F.normalize(x, dim=-1).detach() for x in (q, k.repeat_interleave(2, 1))]
    apart = unit[0][:, :, :, None] - unit[1][:, :, None]  # [B, H, Q, S, D]
    w = features.directions(KEY, 4, 50, 20).double() * sigma[:, None]
    products = torch.einsum("bhqsd,hmd->bhqsm", apart, w).cos().mean(-1)  # cos(a) cos(b) + sin(a) sin(b)
    expected = products / products.sum(-1, keepdim=True).clamp(min=rfa.FLOOR)
    torch.testing.assert_close(rfa.weights(q, k, Mask(False), draw=DRAW, sigma=sigma, features=50), expected)
    many = features.directions(KEY, 4, 20000, 20).double() * sigma[:, None]
    estimate = torch.einsum("bhqsd,hmd->bhqsm", apart, many).cos().mean(-1)
    kernel = (-(apart * sigma[:, None, None]).square().sum(-1) / 2).exp()
    assert (estimate - kernel).abs().max() < 6 / math.sqrt(
        2 * 20000
    )  # a cosine's deviation is at most 1 / sqrt(2)
    plain = (-apart.square().sum(-1) / 2).exp() * math.e  # at sigma 1 the softmax's exponentials
    torch.testing.assert_close(plain, torch.einsum("bhqd,bhsd->bhqs", *unit).exp())


@pytest.mark.parametrize("module", [features, rfa])
def test_bf16_is_as_good_as_its_inputs(module):
    inputs = heads(dtype=torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = value_and_gradients(module.attention, inputs, Mask(False), **own_of(module, torch.float32))
    theirs = value_and_gradients(module.reference, exact, Mask(False), **own_of(module))
    for got, want in zip(ours, theirs, strict=True):
        # Sums are fp32: what is rounded are the upstream gradient and the result, by 2^-9 relative each.
        assert (got.double() - want).norm() / want.norm() < 2**-7


@pytest.mark.parametrize("mask", ["causal", "documents", "pairs", "full"])
@pytest.mark.parametrize("module", [features, rfa])
def test_memory_does_not_grow_with_features(module, mask, monkeypatch):
    monkeypatch.setitem(featured.SEGMENT, "cpu", 2**17)
    length, dim = 2048, 20
    q, k, v = (torch.randn(1, 4, length, dim, requires_grad=True) for _ in range(3))
    documents = (torch.arange(length) // 300)[None] if mask in ("documents", "pairs") else None
    with Largest() as largest, kept() as found:
        own = own_of(module, torch.float32) | {"features": 128}
        out = module.attention(q, k, v, Mask(mask in ("causal", "documents"), documents), **own)
        out.sum().backward()
    assert largest.elements <= 2**18  # a segment's features, both waves; all have 2^20
    assert sum(found.values()) <= 12 * 4 * length * (dim + 8)


@pytest.mark.long
@pytest.mark.parametrize("module", [features, rfa])
def test_it_compiles(module, monkeypatch):
    monkeypatch.setattr(featured, "CHUNK", 16)
    torch.compiler.reset()
    compute = torch.compile(module.attention, fullgraph=True, backend="aot_eager")
    inputs, mask = heads(length=40), Mask(True, torch.tensor([[0] * 20 + [1] * 20] * 2))
    ours, theirs = (
        value_and_gradients(f, inputs, mask, **own_of(module)) for f in (compute, module.reference)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
