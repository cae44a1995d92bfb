"""Gates and convolutions over grids of patches, against timm's modules and transformers' CvT."""

import pytest
import torch
from torch import nn

from headway.kernels.attention import dense
from headway.kernels.attention.grids import grid
from headway.kernels.attention.masks import Mask
from headway.tests import oracles

ROUNDINGS = {"rtol": 1e-12, "atol": 1e-12}
"""fp64: sums of up to 200 terms of order 1, in another order."""


def patches(first=0, side=6, width=16, dtype=torch.float64, rows=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, first + side * side, width, generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_()


def excite_of(module):
    """timm's two 1 x 1 convolutions as [B, E] -> [B, E]."""

    def excite(x_BE):
        return module.fc2(torch.relu(module.fc1(x_BE[..., None, None])))[..., 0, 0]

    return excite


def filled(module):
    """fp64, with parameters far from zero and running statistics that do something."""
    module = module.double().eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in [*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.5)
        for name, tensor in module.named_buffers():
            if name.endswith("running_var"):
                tensor.abs_().add_(0.5)
    return module


def folded(weight, norm):
    """A convolution's weight and bias with the batch norm that follows it, as in evaluation."""
    gain = norm.weight / (norm.running_var + norm.eps).sqrt()
    return weight * gain.view(-1, 1, 1, 1), norm.bias - norm.running_mean * gain


def agree(ours, theirs, inputs):
    """Values, and gradients of a random direction of both."""
    torch.testing.assert_close(ours, theirs, **ROUNDINGS)
    upstream = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3), dtype=ours.dtype)
    gradients = [torch.autograd.grad(y, inputs, upstream, retain_graph=True) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients, **ROUNDINGS)


def test_squeeze_excite_is_timms():
    oracles.timm()
    from timm.layers import SEModule

    x, module = patches(), filled(SEModule(16, rd_channels=4))
    theirs = module(grid.as_map(x)).flatten(2).transpose(1, 2)
    agree(grid.squeeze_excite(x, 0, excite_of(module)), theirs, [x, *module.parameters()])


def test_cbam_is_timms():
    oracles.timm()
    from timm.layers.cbam import CbamModule

    x, module = patches(), filled(CbamModule(16, rd_channels=4))
    theirs = module(grid.as_map(x)).flatten(2).transpose(1, 2)
    weight, bias = folded(module.spatial.conv.conv.weight, module.spatial.conv.bn)
    ours = grid.cbam(x, 0, excite_of(module.channel), weight.flatten(1), bias)
    agree(ours, theirs, [x, *module.parameters()])


def test_non_local_is_timms():
    """Without its norm: one head of dense attention, with the factor that timm gives the scores."""
    oracles.timm()
    from timm.layers import NonLocalAttn

    x, module = patches(), filled(NonLocalAttn(16, rd_channels=8))
    module.norm = nn.Identity()
    theirs = (module(grid.as_map(x)) - grid.as_map(x)).flatten(2).transpose(1, 2)
    linear = [
        torch.nn.functional.linear(x, c.weight[..., 0, 0], c.bias) for c in (module.t, module.p, module.g)
    ]
    heads = dense.reference(*(h.unsqueeze(1) for h in linear), Mask(False), scale=module.scale)
    ours = torch.nn.functional.linear(heads[:, 0], module.z.weight[..., 0, 0], module.z.bias)
    agree(ours, theirs, [x, *module.parameters()])


@pytest.mark.parametrize("first", [0, 1])
def test_convolutions_are_cvts(first):
    """transformers' CvT attention whole, its batch norms folded into what follows them."""
    from transformers.models.cvt.modeling_cvt import CvtSelfAttention

    module = filled(CvtSelfAttention(4, 16, 3, 1, 1, 1, 2, "dw_bn", True, 0.0, with_cls_token=first == 1))
    x = patches(first, side=7)
    theirs = module(x, 7, 7)
    heads = []
    for name, stride in (("query", 1), ("key", 2), ("value", 2)):
        conv = getattr(module, f"convolution_projection_{name}").convolution_projection
        weight, shift = folded(conv.convolution.weight, conv.normalization)
        y = grid.convolved(x, first, weight.flatten(1), stride)
        y = torch.cat((y[:, :first], y[:, first:] + shift), 1)
        y = getattr(module, f"projection_{name}")(y)
        heads.append(y.unflatten(2, (4, 4)).transpose(1, 2))
    ours = dense.reference(*heads, Mask(False), scale=16**-0.5).transpose(1, 2).flatten(2)
    agree(ours, theirs, [x, *module.parameters()])


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_are_the_references(kernel, stride, first):
    x = patches(first, side=5, width=4)
    weight = torch.randn(4, kernel**2, dtype=torch.float64, requires_grad=True)
    ours, theirs = (f(x, first, weight, stride) for f in (grid.convolved, grid.convolved_reference))
    assert ours.shape[1] == first + (-(-5 // stride)) ** 2
    agree(ours, theirs, [x, weight])


def test_a_class_token_is_gated_by_channel_alone():
    x, w = patches(1, width=8), torch.randn(1, 2 * 49, dtype=torch.float64)

    def excite(x_BE):
        return 0.3 * x_BE

    alone = x[:, 1:]
    for ours, theirs in (
        (grid.squeeze_excite(x, 1, excite), grid.squeeze_excite(alone, 0, excite)),
        (grid.cbam(x, 1, excite, w), grid.cbam(alone, 0, excite, w)),
    ):
        torch.testing.assert_close(ours[:, 1:], theirs, **ROUNDINGS)
    means, peaks = alone.mean(1), alone.amax(1)
    torch.testing.assert_close(
        grid.squeeze_excite(x, 1, excite)[:, 0], x[:, 0] * torch.sigmoid(0.3 * means), **ROUNDINGS
    )
    torch.testing.assert_close(
        grid.cbam(x, 1, excite, w)[:, 0], x[:, 0] * torch.sigmoid(0.3 * (means + peaks)), **ROUNDINGS
    )


@pytest.mark.parametrize("gate", ["se", "cbam", "conv"])
def test_bf16_is_as_good_as_bf16_can_be(gate):
    weights = {"cbam": torch.randn(1, 98) / 10, "conv": torch.randn(16, 9) / 3}

    def run(x, dtype):
        if gate == "se":
            return grid.squeeze_excite(x, 1, torch.tanh)
        w = weights[gate].to(torch.bfloat16).to(dtype)
        return grid.cbam(x, 1, torch.tanh, w) if gate == "cbam" else grid.convolved(x, 1, w)

    x = patches(1, dtype=torch.bfloat16)
    wide = x.detach().double()
    got, want = run(x, torch.bfloat16), run(wide, torch.float64)
    assert got.dtype == torch.bfloat16
    # At most three roundings of 2^-9 in a chain (mean, gate, product).
    assert (got.double() - want).norm() / want.norm() < 3 * 2**-8


def test_places_must_fill_a_square():
    with pytest.raises(AssertionError, match="square"):
        grid.as_map(torch.zeros(1, 12, 4))
