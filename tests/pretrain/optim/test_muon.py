"""Muon against PyTorch's, and its orthogonalisation against the singular value decomposition."""

import copy
import math

import pytest
import torch

from headway.pretrain.optim.muon import CHUNK, Muon, _batches, orthogonalise

SHAPES = [(48, 48), (64, 48), (48, 64), (48, 48), (192, 48), (48, 192)]


def matrices(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in SHAPES
    ]


def set_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer, params, steps=4):
    for step in range(steps):
        set_gradients(params, step)
        optimizer.step()
    return [p.detach().clone() for p in params]


def patch_torch_muon(monkeypatch, dtype):
    """PyTorch's iteration is written in bf16; run the same lines in another dtype."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda x: x.to(dtype, copy=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_steps_are_those_of_torch_muon(monkeypatch, dtype, tolerance, weight_decay):
    ours, theirs = matrices(dtype), matrices(dtype)
    settings = {"lr": 0.02, "momentum": 0.95, "weight_decay": weight_decay}
    moved = run(Muon(ours, dtype=dtype, **settings), ours)
    patch_torch_muon(monkeypatch, dtype)
    expected = run(torch.optim.Muon(theirs, adjust_lr_fn="original", **settings), theirs)
    # Products in another order: an entry of the update is off by some 100 roundings (5 iterations, sums of 48
    # to 192 terms), 100 x 6e-8 x lr 0.02 a step on weights of size 1; 1e-5 (1e-13 in fp64) holds it amply.
    for a, b in zip(moved, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_bf16_steps_are_near_torch_muon_in_bf16():
    ours, theirs = matrices(torch.float32), matrices(torch.float32)
    moved = run(Muon(ours, lr=0.02, dtype=torch.bfloat16), ours)
    expected = run(torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, adjust_lr_fn="original"), theirs)
    for a, b, start in zip(moved, expected, matrices(torch.float32), strict=True):
        # Two bf16 iterations (8 bits, 2^-9 a rounding) that sum in other orders: 5 steps of slope up to 3.4
        # leave a few percent of the path.
        assert (a - b).norm() < 0.05 * (b - start).norm()


@pytest.mark.parametrize("shape", [(8, 64, 96), (4, 32, 128), (1, 16, 64)])
def test_singular_values_become_about_one_and_vectors_stay(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = orthogonalise(x)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    core = u.mT @ y @ vt.mT  # diagonal if the singular vectors stay
    values = core.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.6  # such matrices are well conditioned; for others see the test below
    assert values.max() < 1.25
    torch.testing.assert_close(core, torch.diag_embed(values), rtol=0, atol=1e-12)


def test_each_singular_value_goes_through_the_quintic():
    values = torch.logspace(-6, 0, 40, dtype=torch.float64)
    q1, _ = torch.linalg.qr(
        torch.randn(40, 40, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    )
    q2, _ = torch.linalg.qr(
        torch.randn(40, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    )
    y = orthogonalise((q1 * values @ q2.T)[None], steps=5)[0]
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close((q1.T @ y @ q2).diagonal(), expected, rtol=0, atol=1e-12)
    assert expected[values > 3e-2].min() > 0.6  # the band the coefficients aim at


def test_zero_gradients_move_nothing():
    p = torch.ones(4, 6, requires_grad=True)
    p.grad = torch.zeros(4, 6)
    Muon([p], lr=1.0).step()
    assert torch.equal(p, torch.ones(4, 6))


def test_experts_are_a_batch_of_matrices():
    stacked = torch.randn(5, 12, 8, dtype=torch.float64).requires_grad_()
    single = [m.clone().requires_grad_() for m in stacked.detach()]
    stacked.grad = torch.randn(5, 12, 8, dtype=torch.float64)
    for m, gradient in zip(single, stacked.grad, strict=True):
        m.grad = gradient.clone()
    Muon([stacked], lr=0.1).step()
    Muon(single, lr=0.1).step()
    torch.testing.assert_close(
        stacked.detach(), torch.stack([m.detach() for m in single]), rtol=0, atol=1e-14
    )


def test_parameters_without_gradient_stay_and_state_resumes_bitwise():
    params = matrices(torch.float32)
    optimizer = Muon(params, lr=0.02)
    set_gradients(params, 0)
    params[2].grad = None
    before = params[2].detach().clone()
    optimizer.step()
    assert torch.equal(params[2], before)
    copies = [p.detach().clone().requires_grad_() for p in params]
    resumed = Muon(copies, lr=0.02)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for set_of, opt in ((params, optimizer), (copies, resumed)):
        set_gradients(set_of, 1)
        opt.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


def test_equal_shapes_and_transposes_share_a_batch_within_the_bound():
    with torch.device("meta"):
        big = [torch.empty(4096, 4096) for _ in range(9)]  # 2^24 each
        assert [len(b) for b in _batches(big)] == [4, 4, 1]
        assert _batches([torch.empty(8, 2), torch.empty(2, 2), torch.empty(2, 8)]) == [[0, 2], [1]]
        assert _batches([torch.empty(2, CHUNK), torch.empty(2, CHUNK)]) == [[0], [1]]


def test_the_factor_keeps_the_size_of_outputs():
    p = torch.zeros(64, 16, dtype=torch.float64).requires_grad_()
    p.grad = torch.linalg.qr(torch.randn(64, 16, dtype=torch.float64))[0]
    Muon([p], lr=1.0).step()
    values = torch.linalg.svdvals(p.detach())
    assert values.min() > 0.6 * math.sqrt(4)
    assert values.max() < 1.25 * math.sqrt(4)


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"shape \(4,\)"):
        Muon([torch.ones(4, requires_grad=True)])
