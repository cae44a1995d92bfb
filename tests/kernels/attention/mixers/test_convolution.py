"""Convolutions along the sequence against Vortex's, a loop, and a dense Toeplitz matrix."""

import pytest
import torch
import torch.nn.functional as F

from headway.kernels.attention.mixers import convolution
from headway.tests import oracles
from headway.tests.kernels.attention.test_kernels import Largest


def inputs(length, dtype=torch.float64, batch=2, channels=3):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, channels, length), (channels, length), (channels,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def value_and_gradients(compute, given):
    out = compute(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, given, upstream.to(out.dtype))


def test_reference_is_the_equation():
    u, h, skip = inputs(7)
    out = convolution.reference(u, h, skip)
    for b, c, t in [(0, 0, 0), (1, 2, 6), (0, 1, 3)]:
        total = skip[c] * u[b, c, t]
        for s in range(t + 1):
            total = total + h[c, t - s] * u[b, c, s]
        torch.testing.assert_close(out[b, c, t], total)


@pytest.mark.parametrize("length", [1, 2, 37, 128])
def test_reference_is_vortexs(length):
    given = inputs(length)
    theirs = value_and_gradients(
        lambda u, h, skip: oracles.vortex_convolution()(u, h, skip, None, gelu=False), given
    )
    ours = value_and_gradients(convolution.reference, given)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # fp64, sums of 256 terms of order 1


@pytest.mark.parametrize("length", [1, 2, 3, 37, 101, 128])
def test_transforms_match_the_reference(length):
    given = inputs(length)
    ours, theirs = (value_and_gradients(f, given) for f in (convolution.long, convolution.reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # fp64, sums of 256 terms of order 1
    given = inputs(length, torch.float32)
    ours, theirs = (value_and_gradients(f, given) for f in (convolution.long, convolution.reference))
    torch.testing.assert_close(
        ours, theirs, rtol=1e-4, atol=1e-4
    )  # 2^-24 of sums of 256 terms, by log2(n) stages


def test_gradients_of_transforms():
    assert torch.autograd.gradcheck(convolution.long, inputs(5))
    u, h, skip = inputs(5)
    assert torch.autograd.gradcheck(lambda h: convolution.long(u.detach(), h, skip.detach()), (h,))


def test_bf16_is_as_good_as_bf16_can_be():
    given = inputs(100, torch.bfloat16)
    exact = value_and_gradients(convolution.reference, [t.detach().double().requires_grad_() for t in given])
    for got, want in zip(value_and_gradients(convolution.long, given), exact, strict=True):
        # Transforms are in fp32: one rounding of the upstream gradient, one of the result, 2^-9 each.
        assert (got.double() - want).norm() / want.norm() < 2**-8


def test_the_future_is_not_seen():
    u, h, skip = inputs(60)
    changed = u.detach().clone()
    changed[..., 40:] = 9
    for compute, tolerance in ((convolution.reference, 0), (convolution.long, 1e-12)):
        difference = compute(changed, h, skip) - compute(u, h, skip)
        assert difference[..., :40].abs().max() <= tolerance  # roundings of a transform reach everywhere
        assert difference[..., 40:].abs().min() > 0


def test_memory_grows_with_the_length():
    u, h, skip = inputs(3000, torch.float32)
    with Largest() as largest:
        convolution.long(u, h, skip).sum().backward()
    # Spectra of 6144 / 2 + 1 complex numbers, and what comes back before it is cut.
    assert largest.elements <= u[..., 0].numel() * convolution.transform_length(3000)


def test_transform_lengths():
    for length in range(1, 300):
        found = convolution.transform_length(length)
        assert 2 * length - 1 <= found <= max(1, 4 / 3 * (2 * length - 2) + 1)
        assert found in [odd << n for odd in (1, 3, 5) for n in range(11)]


@pytest.mark.parametrize("length", [1, 2, 9])
def test_short_filters_are_torchs(length):
    u, taps = torch.randn(2, length, 5, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    given = u.requires_grad_(), taps.requires_grad_()

    def torchs(u, taps):
        return F.conv1d(F.pad(u.mT, (2, 0)), taps.flip(1)[:, None], groups=5).mT

    ours, theirs = (value_and_gradients(f, given) for f in (convolution.short, torchs))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # fp64, sums of 3 (taps: 18) terms
