"""Gradient norm and clipping against PyTorch's."""

import pytest
import torch

from headway.pretrain.optim.clipping import clip_factor, global_norm, scale_gradients_

SHAPES = [(300, 200), (7,), (), (5, 3, 2), (4096,), (4097,), (1, 0)]


def parameters(dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in SHAPES]
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(dtype)
    return [*params, torch.nn.Parameter(torch.zeros(3))]  # the last one has no gradient


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_norm_and_clipping_are_pytorchs(dtype, scale):
    ours, theirs = parameters(dtype, scale), parameters(dtype, scale)
    norm = global_norm(ours)
    exact = torch.cat([p.grad.double().reshape(-1) for p in theirs if p.grad is not None]).norm()
    # Sums of 1,024 squares in turn are off by tens of roundings of 6e-8, the norm by half of that; in fp64
    # the expectation, one long sum, is itself off by more.
    torch.testing.assert_close(norm.double(), exact, rtol=1e-13 if dtype == torch.float64 else 1e-6, atol=0)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
    scale_gradients_(ours, clip_factor(norm, 1.0))
    # Their norm is in the gradients' dtype; a factor that differs by its rounding changes bf16 gradients by
    # one rounding (2^-8).
    rtol = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 2**-7}[dtype]
    torch.testing.assert_close(norm.to(expected.dtype), expected, rtol=rtol, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        if b.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=rtol, atol=0)


def test_small_gradients_are_not_touched():
    params = parameters(scale=1e-6)
    before = [p.grad.clone() for p in params[:-1]]
    scale_gradients_(params, clip_factor(global_norm(params), 1.0))
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=False))


def test_the_norm_of_a_long_vector_is_exact_to_fp32():
    """PyTorch's own fp32 norm of this vector is off by 3e-4, more with every element."""
    p = torch.nn.Parameter(torch.zeros(10_000_000))
    p.grad = torch.rand(p.shape, generator=torch.Generator().manual_seed(0))
    exact = torch.linalg.vector_norm(p.grad, dtype=torch.float64)
    torch.testing.assert_close(global_norm([p]).double(), exact, rtol=1e-7, atol=0)


def test_fp64_gradients_are_summed_in_fp64():
    p = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    p.grad = torch.tensor([1.0, 1e-6], dtype=torch.float64)
    assert global_norm([p]).item() == pytest.approx((1 + 1e-12) ** 0.5, rel=1e-16)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_bad_gradient_shows_in_the_norm(bad):
    params = parameters()
    params[0].grad[17, 5] = bad
    assert not torch.isfinite(global_norm(params))


def test_no_gradients_no_norm():
    assert global_norm([torch.nn.Parameter(torch.ones(3))]).item() == 0.0
    scale_gradients_([torch.nn.Parameter(torch.ones(3))], 0.5)


def test_the_norm_repeats_bitwise_and_scaling_takes_a_number():
    params = parameters()
    assert torch.equal(global_norm(params), global_norm(parameters()))
    scale_gradients_(params, 0.5)
    assert all(torch.equal(p.grad, q.grad / 2) for p, q in zip(params[:-1], parameters()[:-1], strict=True))
