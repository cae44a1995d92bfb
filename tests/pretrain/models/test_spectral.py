"""sigmaReparam against torch's spectral norm, singular values and its gradient's equation."""

import pytest
import torch
from torch import nn

from headway.pretrain import config
from headway.pretrain.models.init import initialise
from headway.pretrain.models.spectral import SpectralLinear


def layer(inputs=30, outputs=20, dtype=torch.float64):
    made = SpectralLinear(inputs, outputs).to(dtype)
    initialise(made, config.Model(init=config.Init(std=0.3)), 0)
    return made


def test_converges_to_the_spectral_norm():
    made = layer()
    true = torch.linalg.matrix_norm(made.weight, 2).item()
    assert made.sigma().item() < true
    made.iterate(times=2000)  # the error falls with (s2 / s1)^2 an iteration
    assert abs(made.sigma().item() / true - 1) < 1e-12
    product = torch.linalg.matrix_norm(made(torch.eye(30, dtype=torch.float64)) - made.bias, 2)
    assert abs(product.item() - 1) < 1e-12  # gain


def test_forward_and_gradients_are_torchs_spectral_norm():
    made, theirs = layer(), nn.Linear(30, 20).double()
    theirs.load_state_dict({"weight": made.weight, "bias": made.bias})
    theirs = nn.utils.parametrizations.spectral_norm(theirs, n_power_iterations=1)
    norm = theirs.parametrizations.weight[0]
    norm.eval()  # no iteration of its own in the forward
    made.iterate(times=3)
    norm._u.copy_(made.direction)
    norm._v.copy_(nn.functional.normalize(made.direction @ made.weight.detach(), dim=0))
    x = torch.randn(7, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours, expected = made(x), theirs(x)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-14)
    ours.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(
        made.weight.grad, theirs.parametrizations.weight.original.grad, rtol=0, atol=1e-13
    )


def test_gradient_of_sigma_is_u_v():
    made = layer()
    made.iterate(times=2)
    made.sigma().backward()
    v = nn.functional.normalize(made.direction @ made.weight.detach(), dim=0)
    torch.testing.assert_close(made.weight.grad, torch.outer(made.direction, v), rtol=0, atol=1e-15)


def test_gain_scales_and_is_trained():
    made = layer()
    x = torch.randn(3, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = made(x).detach()
    with torch.no_grad():
        made.gain.fill_(2.5)
    after = made(x)
    torch.testing.assert_close(after, 2.5 * before, rtol=1e-14, atol=1e-15)  # biases are zeros
    after.sum().backward()
    torch.testing.assert_close(made.gain.grad, before.sum()[None], rtol=1e-12, atol=0)


def test_forwards_do_not_iterate():
    made = layer()
    direction = made.direction.clone()
    made(torch.ones(2, 30, dtype=torch.float64)).sum().backward()
    assert torch.equal(made.direction, direction)
    assert set(made.state_dict()) == {"weight", "bias", "gain", "direction"}


@pytest.mark.parametrize("part", [slice(0, 8), slice(0, 0)])
def test_iterates_by_a_weight_that_is_gathered_elsewhere(part):
    made, held = layer(), layer()
    whole = held.weight.detach()
    held.weight = nn.Parameter(whole[part].clone())
    made.iterate()
    held.iterate(whole)
    assert torch.equal(made.direction, held.direction)


def test_sigma_is_not_narrowed_by_autocast():
    made = layer(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert made.sigma().dtype == torch.float32
        assert torch.equal(made.sigma(), layer(dtype=torch.float32).sigma())
        assert made(torch.ones(2, 30)).dtype == torch.bfloat16
