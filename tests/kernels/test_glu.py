"""Activations against transformers' table of the same names."""

import pytest
import torch

from headway.kernels import glu


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("gelu", "gelu_python"),
        ("gelu_tanh", "gelu_new"),
        ("relu", "relu"),
        ("relu2", "relu2"),
        ("silu", "silu"),
    ],
)
def test_plain(ours, theirs):
    from transformers.activations import ACT2FN

    x = torch.randn(1000, dtype=torch.float64) * 4
    torch.testing.assert_close(glu.PLAIN[ours](x), ACT2FN[theirs](x), rtol=1e-12, atol=1e-12)


def test_gated():
    gate, up = torch.randn(2, 1000, dtype=torch.float64)
    torch.testing.assert_close(glu.swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up)
    torch.testing.assert_close(glu.geglu(gate, up), gate * 0.5 * (1 + torch.erf(gate / 2**0.5)) * up)


def test_compiled_is_eager():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    for name, f in glu.PLAIN.items():
        ours, theirs = torch.compile(f, dynamic=False)(x), f(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
        upstream = torch.ones_like(x)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
