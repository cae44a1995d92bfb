"""Monarch matrices against the butterfly of others, Fourier's matrix, and the matrix written out."""

import pytest
import torch

from headway.kernels.attention.mixers import monarch
from headway.tests import oracles
from headway.tests.kernels.attention.test_kernels import Largest


def inputs(length, block, dtype=torch.float64, heads=2, dim=3, batch=2):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, length, heads, dim), *[(heads, block, block, block)] * 2]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def value_and_gradients(compute, given):
    out = compute(*given)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return out, *torch.autograd.grad(out, given, upstream.to(out.dtype))


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("block", [1, 3, 8])
def test_reference_is_the_butterfly(version, block):
    given = inputs(block**2, block, heads=1)
    butterfly = oracles.file("zeta/nn/modules/blockdiag_butterfly.py").blockdiag_butterfly_multiply_reference

    def theirs(x, left, right):
        rows = x[:, :, 0].transpose(1, 2).reshape(-1, block**2)
        out = butterfly(rows, right[0], left[0], version=version)
        return out.view(2, 3, block**2).transpose(1, 2)[:, :, None]

    torch.testing.assert_close(
        value_and_gradients(monarch.reference, given),
        value_and_gradients(theirs, given),
        rtol=1e-11,
        atol=1e-11,
    )  # fp64, sums of 64 terms


def test_matrix_is_permutations_and_blocks():
    _, left, right = inputs(16, 4)
    identity = torch.eye(16, dtype=torch.float64)
    p = identity.view(4, 4, 16).transpose(0, 1).reshape(16, 16)
    for h in range(2):
        l_matrix, r_matrix = (torch.block_diag(*m[h]) for m in (left, right))
        torch.testing.assert_close(monarch.matrix(left, right)[h], p @ l_matrix @ p @ r_matrix)


@pytest.mark.parametrize("block", [1, 2, 4, 7])
def test_fouriers_matrix_is_one(block):
    n = block**2
    place = torch.arange(block)

    def root(exponent, order):
        return torch.polar(
            torch.ones(exponent.shape, dtype=torch.float64), -2 * torch.pi * exponent.double() / order
        )

    waves = root(place[:, None] * place, block)
    right = waves.expand(1, block, block, block)
    twiddles = root(place[:, None] * place, n)  # [q, k]
    left = (waves[None] * twiddles[:, None])[None]
    x = torch.randn(2, n, 1, 3, dtype=torch.complex128)
    turned = x.view(2, block, block, 1, 3).transpose(1, 2).reshape(x.shape)  # P x
    for compute in (monarch.reference, monarch.blocks):
        torch.testing.assert_close(
            compute(turned, left, right), torch.fft.fft(x, dim=1), rtol=1e-12, atol=1e-12
        )  # fp64, sums of 49 terms


@pytest.mark.parametrize(
    ("length", "block"), [(1, 1), (1, 4), (9, 3), (10, 4), (16, 4), (5, 4), (33, 6), (36, 6)]
)
def test_blocks_match_the_reference(length, block):
    given = inputs(length, block)
    ours, theirs = (value_and_gradients(f, given) for f in (monarch.blocks, monarch.reference))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)  # fp64, sums of up to 36 terms


def test_gradients():
    assert torch.autograd.gradcheck(monarch.blocks, inputs(7, 3, heads=1, dim=2, batch=1))


def test_zeros_after_a_row_change_nothing():
    x, left, right = inputs(20, 6)
    longer = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 13))
    torch.testing.assert_close(monarch.blocks(longer, left, right)[:, :20], monarch.blocks(x, left, right))


def test_too_long_a_row_is_refused():
    with pytest.raises(AssertionError, match="17 places, and blocks of 4 hold 16"):
        monarch.blocks(*inputs(17, 4))


def test_bf16_is_as_good_as_bf16_can_be():
    given = inputs(90, 10, torch.bfloat16)
    exact = value_and_gradients(monarch.reference, [t.detach().double().requires_grad_() for t in given])
    for got, want in zip(value_and_gradients(monarch.blocks, given), exact, strict=True):
        # Three roundings (upstream gradient, middle, result) of 2^-9 at most each.
        assert (got.double() - want).norm() / want.norm() < 3 * 2**-9


def test_memory_grows_with_the_length():
    x, left, right = inputs(1000, 32, torch.float32, dim=16)
    with Largest() as largest:
        monarch.blocks(x, left, right).sum().backward()
    assert largest.elements <= x[0, 0].numel() * 2 * 1024  # and the matrices hold 2 x 32^3


def test_costs():
    assert monarch.flops(2, 3, 16, 4) == 2 * 2 * 3 * (16 * 4 + 16 * 4)  # two products of b^3 a channel
    assert monarch.flops(1, 1, 5, 4) == 2 * (2 * 4 * 4 + 2 * 4 * 2)
