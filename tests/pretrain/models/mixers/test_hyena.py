"""Hyena against the operator written out with Vortex's convolution, and its filter against the authors' formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.init import initialise
from headway.pretrain.models.mixers import build_mixer
from headway.pretrain.models.seat import Seat
from headway.tests import oracles

HIDDEN, LENGTH = 12, 37


def layer_of(kernel="auto", tokens=LENGTH, dtype=torch.float64, **attention):
    made = config.Attention(mechanism="hyena", kernel=kernel, width=8, **attention)
    model = config.Model(hidden=HIDDEN, heads=3, positions="none", attention=made)
    layer = build_mixer(model, Seat(0, True, tokens=tokens)).to(dtype)
    initialise(layer, model.model_copy(update={"init": config.Init(scheme="normal", std=0.3)}), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) * 0.1)
    return layer


def inputs(length=LENGTH):
    return torch.randn(2, length, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def safaris(layer, x, length):
    """The operator as the authors' code has it: projections side by side, one convolution of 3 E channels."""
    projected = torch.cat([layer.q(x), layer.k(x), layer.v(x)], -1).mT
    short = F.conv1d(F.pad(projected, (2, 0)), layer.taps.flatten(0, 1).flip(1)[:, None], groups=3 * HIDDEN)
    q, k, v = short.split(HIDDEN, 1)
    y = oracles.vortex_convolution()(
        k * v, safaris_filter(layer.filter, length), layer.skip, None, gelu=False
    )
    return layer.o((q * y).mT)


def safaris_filter(f, length):
    """Positional features, sines and decay of the authors' HyenaFilter, for rows of `f.tokens`."""
    t = torch.linspace(0, 1, f.tokens, dtype=torch.float64)[:length, None]
    w = 2 * math.pi * torch.linspace(0, f.tokens - 1, f.tokens, dtype=torch.float64)[:length, None] / f.tokens
    z = torch.exp(-1j * torch.linspace(1e-4, 15, 16, dtype=torch.float64) * w)
    x = torch.cat([t, z.real, z.imag], -1)
    for layer in (f.first, f.second, f.third):
        x = torch.sin(f.frequency * layer(x))
    deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, HIDDEN, dtype=torch.float64)
    return (f.last(x) * torch.exp(-t * deltas.abs())).mT


@pytest.mark.parametrize("kernel", ["reference", "fft"])
@pytest.mark.parametrize("length", [LENGTH, 20])
def test_it_is_the_authors(kernel, length):
    layer, x = layer_of(kernel), inputs(length).requires_grad_()
    ours, _ = layer(x, Mask())
    theirs = safaris(layer, x, length)
    # fp64: angles of up to 14 x 94 radians carry 1e-13, and sums have 74 terms.
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    given = [x, *layer.parameters()]
    slopes = [torch.autograd.grad(y.square().sum(), given) for y in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=1e-8, atol=1e-8)


def test_rows_of_any_length_share_a_filter():
    layer, x = layer_of(), inputs()
    whole = layer(x, Mask())[0]
    torch.testing.assert_close(layer(x[:, :13], Mask())[0], whole[:, :13])
    torch.testing.assert_close(layer(x, Mask(), queries=13)[0], whole[:, :13])


def test_padding_before_a_row_is_silence():
    layer, x = layer_of(), inputs()
    documents = torch.tensor([[0] * 10 + [-1] * 7 + [0] * 20, [0] * LENGTH])
    other = x.clone()
    other[0, 10:17] = 50
    ours, theirs = (layer(t, Mask(True, documents))[0] for t in (x, other))
    torch.testing.assert_close(ours[documents >= 0], theirs[documents >= 0])


def test_autocast_keeps_the_filter_exact():
    layer, x = layer_of(dtype=torch.float32), inputs().float()
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = layer(x, Mask())
        h = layer.filter(LENGTH)
    assert y.dtype == torch.bfloat16
    assert h.dtype == torch.float32
    assert torch.equal(h, layer.filter(LENGTH))
    exact = layer(x, Mask())[0]
    assert (
        y - exact
    ).norm() / exact.norm() < 8 * 2**-8  # eight roundings in a row: projections, taps, gates, output


def test_filters_begin_as_the_authors():
    layer = layer_of()
    model = config.Model(hidden=HIDDEN, heads=3)
    for scheme in ("gpt2", "xavier", "orthogonal"):
        initialise(layer, model.model_copy(update={"init": config.Init(scheme=scheme)}), seed=1)
        assert (layer.filter.frequency == 14).all()
        bound = layer.filter.second.weight.abs().max()
        assert 0.3 < bound <= 8**-0.5
        assert layer.taps.abs().max() <= 3**-0.5
        assert layer.skip.std() > 0.4


def test_it_compares_no_heads():
    with pytest.raises(JobError, match=r"qk_norm.*hyena"):
        layer_of(qk_norm=True)
