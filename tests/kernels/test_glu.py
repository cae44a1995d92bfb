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


def test_geglu_tanh_is_t5s():
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5DenseGatedActDense

    settings = T5Config(d_model=6, d_ff=9, dropout_rate=0.0, feed_forward_proj="gated-gelu")
    layer, x = T5DenseGatedActDense(settings).double(), torch.randn(50, 6, dtype=torch.float64)
    with torch.no_grad():
        ours = layer.wo(glu.GATED["geglu_tanh"](layer.wi_0(x), layer.wi_1(x)))
        torch.testing.assert_close(ours, layer(x), rtol=1e-12, atol=1e-12)


def test_compiled_is_eager():
    x = torch.randn(1000, dtype=torch.float64, requires_grad=True)
    gated = {name: lambda x, f=f: f(x, x.flip(0)) for name, f in glu.GATED.items()}
    for name, f in (glu.PLAIN | gated).items():
        ours, theirs = torch.compile(f, dynamic=False)(x), f(x)
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, msg=name)
        upstream = torch.ones_like(x)
        gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (ours, theirs)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-11)
