"""Adafactor against transformers' and PyTorch's."""

import copy

import pytest
import torch

from headway.pretrain.optim.adafactor import Adafactor

SHAPES = [(48, 32), (32, 48), (7,), (5, 12, 8), (1, 3), (3000,), ()]


def parameters(dtype, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    return [
        (scale * torch.randn(s, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()
        for s in SHAPES
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        size = 10.0 ** -(step % 3)  # so that updates are clipped after a growth
        p.grad = (size * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(p.dtype)


def run(optimizer, params, steps=7):
    for step in range(steps):
        set_gradients(params, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (1 + step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize("scale", [1.0, 1e-5])
def test_steps_are_those_of_transformers(dtype, tolerance, scale):
    from transformers.optimization import Adafactor as Theirs

    ours, theirs = parameters(dtype, scale), parameters(dtype, scale)
    moved = run(Adafactor(ours), ours)
    oracle = Theirs(theirs, lr=0.02, scale_parameter=True, relative_step=False)
    # Seven moves of up to 0.02 in weights of some 1 to 4, each off by some roundings of the weight.
    for a, b in zip(moved, run(oracle, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_and_decay_are_those_of_torch_below_its_cap(weight_decay):
    """torch's rate is at most 1 / sqrt(t), which 0.02 is not in seven steps."""
    ours, theirs = parameters(torch.float64), parameters(torch.float64)
    moved = run(Adafactor(ours, weight_decay=weight_decay), ours)
    oracle = torch.optim.Adafactor(theirs, weight_decay=weight_decay, eps=(1e-30, 1e-3))
    for a, b in zip(moved, run(oracle, theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def test_a_matrix_keeps_a_row_and_a_column_and_experts_each_their_own():
    params = parameters(torch.float32)
    optimizer = Adafactor(params)
    set_gradients(params, 0)
    optimizer.step()
    shapes = [{k: tuple(v.shape) for k, v in optimizer.state[p].items()} for p in params]
    assert shapes[0] == {"step": (), "rows": (48, 1), "columns": (1, 32)}
    assert shapes[2] == {"step": (), "variance": (7,)}
    assert shapes[3] == {"step": (), "rows": (5, 12, 1), "columns": (5, 1, 8)}


def test_rows_without_gradient_stay_finite_and_still():
    """Of a token that never occurs."""
    p = torch.ones(4, 6, requires_grad=True)
    optimizer = Adafactor([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(4, 6)
        p.grad[1] = 0
        optimizer.step()
    assert torch.equal(p[1], torch.ones(6))
    assert torch.isfinite(p).all()
    p.grad = torch.ones(4, 6)  # its first gradient, after ages
    optimizer.step()
    assert torch.isfinite(p).all()
    assert (p[1] < 1).all()


def test_a_step_at_rate_zero_makes_state_that_zeroed_is_the_initial_one():
    """So engines allocate moments before a checkpoint is read into them."""
    used, fresh = parameters(torch.float32), parameters(torch.float32)
    first, second = Adafactor(used), Adafactor(fresh)
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
    optimizer = Adafactor(params)
    run(optimizer, params, 2)
    copies = [p.detach().clone().requires_grad_() for p in params]
    resumed = Adafactor(copies)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for set_of, opt in ((params, optimizer), (copies, resumed)):
        set_gradients(set_of, 5)
        set_of[0].grad = None
        before = set_of[0].detach().clone()
        opt.step()
        assert torch.equal(set_of[0], before)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))
