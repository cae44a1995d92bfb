"""LAMB against timm's."""

import copy

import pytest
import torch

from headway.pretrain.optim.lamb import Lamb
from headway.tests import oracles

SHAPES = [(48, 32), (7,), (5, 12, 8), (1, 3), (3000,)]


def parameters(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def groups(params, weight_decay, **flags):
    return [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0, **flags},
    ]


def run(optimizer, params, steps=6):
    for step in range(steps):
        set_gradients(params, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("always", [False, True])
def test_steps_are_those_of_timms_lamb(dtype, tolerance, always):
    oracles.timm()
    from timm.optim import Lamb as Theirs

    ours, theirs = parameters(dtype), parameters(dtype)
    settings = {"betas": (0.9, 0.95), "eps": 1e-8}
    moved = run(Lamb(groups(ours, 0.1, adapt=always), **settings), ours)
    oracle = Theirs(groups(theirs, 0.1), max_grad_norm=None, always_adapt=always, **settings)
    # Moves of lr 0.02 x |w| / |r| near 1, six times, with relative errors of some roundings of 6e-8 (1e-16).
    for a, b in zip(moved, run(oracle, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_a_first_step_is_as_long_as_the_rate_times_the_weights():
    """The paper's claim: |step| = lr x |w|, whatever the gradient."""
    p = torch.randn(20, 30, dtype=torch.float64).requires_grad_()
    before = p.detach().clone()
    p.grad = torch.randn(20, 30, dtype=torch.float64) * 1e5
    Lamb([p], lr=0.01).step()
    assert float((p.detach() - before).norm() / before.norm()) == pytest.approx(0.01, rel=1e-12)


def test_zeros_move_nothing_and_zero_weights_move_by_the_plain_step():
    still, start = torch.ones(4, 6, requires_grad=True), torch.zeros(4, 6, requires_grad=True)
    still.grad, start.grad = torch.zeros(4, 6), torch.ones(4, 6)
    Lamb([still, start], lr=0.1, weight_decay=0.0).step()
    assert torch.equal(still, torch.ones(4, 6))
    torch.testing.assert_close(start.detach(), torch.full((4, 6), -0.1))


def test_a_step_at_rate_zero_makes_state_that_zeroed_is_the_initial_one():
    """So engines allocate moments before a checkpoint is read into them."""
    used, fresh = parameters(torch.float32), parameters(torch.float32)
    first, second = Lamb(used), Lamb(fresh)
    for group in first.param_groups:
        group["lr"] = 0.0
    for p in used:
        p.grad = torch.zeros_like(p)
    first.step()
    assert all(torch.equal(a, b) for a, b in zip(used, fresh, strict=True))
    for entries in first.state.values():
        assert all(torch.isfinite(value.zero_()).all() for value in entries.values())
    for a, b in zip(run(first, used), run(second, fresh), strict=True):
        assert torch.equal(a, b)


def test_state_resumes_bitwise_and_parameters_without_gradient_stay():
    params = parameters(torch.float32)
    optimizer = Lamb(params)
    run(optimizer, params, 2)
    copies = [p.detach().clone().requires_grad_() for p in params]
    resumed = Lamb(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for set_of, opt in ((params, optimizer), (copies, resumed)):
        set_gradients(set_of, 5)
        set_of[0].grad = None
        before = set_of[0].detach().clone()
        opt.step()
        assert torch.equal(set_of[0], before)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
