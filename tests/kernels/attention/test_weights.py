"""Weightings against entmax, gpt-oss and the equations."""

from types import SimpleNamespace

import pytest
import torch
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as gpt_oss

from headway.kernels.attention.compose import weigh
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.kernels.attention.weights import Entmax15, Sigmoid, Sparsemax
from headway.tests import oracles


def package(name):
    oracles.package_folder("entmax")
    import entmax

    return getattr(entmax, name)


CASES = [("sparsemax", Sparsemax()), ("entmax15", Entmax15())]


@pytest.mark.parametrize("spread", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("name", "weighting"), CASES)
def test_sparse_weights_are_the_packages(name, weighting, spread):
    generator = torch.Generator().manual_seed(3)
    scores = (torch.randn(2, 3, 5, 211, generator=generator, dtype=torch.float64) * spread).requires_grad_()
    ours, theirs = weigh(weighting, scores, None, None), package(name)(scores, dim=-1)
    # Newton's steps end within some roundings of fp64 of the root; a square root doubles what 1.5-entmax may be off.
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.sum(-1), torch.ones_like(ours[..., 0]))
    up = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    found = [torch.autograd.grad(y, scores, up)[0] for y in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("name", "weighting"), CASES)
def test_fp32_ends_as_well(name, weighting):
    scores = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))[None] * 5
    theirs = package(name)(scores.double(), dim=-1).float()
    torch.testing.assert_close(weigh(weighting, scores, None, None), theirs, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("weighting", [Sparsemax(), Entmax15(), Sigmoid()])
def test_keys_that_are_not_seen_weigh_nothing(weighting):
    scores = torch.randn(1, 2, 3, 9, dtype=torch.float64, requires_grad=True)
    seen = torch.ones(1, 1, 3, 9, dtype=torch.bool)
    seen[..., 1, 4:] = False
    seen[..., 2, :] = False
    weights = weigh(weighting, scores, seen, None)
    assert (weights[..., 1, 4:] == 0).all()
    assert (weights[..., 2, :] == 0).all()
    torch.testing.assert_close(
        weights[..., 1, :4], weigh(weighting, scores[..., 1:2, :4], None, None)[..., 0, :]
    )
    (slope,) = torch.autograd.grad(weights.square().sum(), scores)
    assert slope.isfinite().all()
    assert (slope[..., 2, :] == 0).all()


@pytest.mark.parametrize("kernel", ["reference", "blocks"])
def test_sinks_are_gpt_osss(kernel):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 9, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for h in (4, 2, 2)
    )
    sinks = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    hidden = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)
    theirs = gpt_oss(module, q, k, v, hidden, 8**-0.5)[0].transpose(1, 2)
    ours = mechanism("sink").kernels[kernel].compute(q, k, v, Mask(), sink=sinks)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    up = torch.randn(ours.shape, generator=generator, dtype=torch.float64)
    found = [torch.autograd.grad(y, (q, k, v, sinks), up) for y in (ours, theirs)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)


def test_sigmoid_is_the_equation():
    scores = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    seen = torch.ones(6, 6, dtype=torch.bool).tril()[None, None]
    weights = weigh(Sigmoid(), scores, seen, None)
    for i in range(6):
        expected = torch.sigmoid(scores[0, 0, i, : i + 1] - torch.tensor(i + 1.0).double().log())
        torch.testing.assert_close(weights[0, 0, i, : i + 1], expected)


def test_a_hard_choice_is_one_of_the_softmax():
    rows, keys = 4000, 5
    q, k = torch.zeros(rows, 1, 1, 2), torch.zeros(rows, 1, keys, 2)
    q[..., 0], k[..., 0] = 1.0, torch.arange(keys) * 0.5 * 2**0.5
    v = torch.eye(keys).expand(rows, 1, keys, keys)
    draw = Draw(torch.tensor(1), torch.tensor(0), torch.tensor(99), torch.arange(rows), torch.tensor([3]))
    for kernel in mechanism("hard").kernels_on("cpu").values():
        out = kernel.compute(q, k, v, Mask(False), temperature=0.7, draw=draw)
        assert (out.sum(-1) == 1).all()
        assert (out.amax(-1) == 1).all()
        p = torch.softmax(torch.arange(keys) * 0.5, 0)
        # Frequencies of 4,000 draws: deviations below 0.008.
        assert (out.mean((0, 1, 2)) - p).abs().max() < 5 * 0.008


def test_a_hard_choice_learns_as_its_relaxation():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
        for _ in range(3)
    )
    draw = Draw(torch.tensor(1), torch.tensor(0), torch.tensor(99), torch.arange(2), torch.arange(7))
    noise = draw.gumbel(slice(0, 2), slice(0, 3), slice(0, 7), torch.arange(7))
    soft = ((q @ k.mT / 2 + noise) / 0.7).softmax(-1)
    one = torch.zeros_like(soft).scatter(-1, soft.argmax(-1, keepdim=True), 1.0)
    theirs = (one - soft.detach() + soft) @ v
    for kernel in mechanism("hard").kernels_on("cpu").values():
        ours = kernel.compute(q, k, v, Mask(False), temperature=0.7, draw=draw)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
        found = [torch.autograd.grad(y.square().sum(), (q, k, v), retain_graph=True) for y in (ours, theirs)]
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-11)
