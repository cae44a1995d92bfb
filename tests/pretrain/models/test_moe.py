"""The layer against transformers' sparse blocks; rows, kernels, precisions, compilation."""

import pytest
import torch
from torch import nn

from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.init import initialise
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.moe import MoE

B, S, E, F, X = 3, 14, 12, 20, 6


def model_of(activation="swiglu", bias=False, **experts):
    experts = config.Experts(**{"count": X, "ffn": F, **experts})
    return config.Model(hidden=E, heads=3, activation=activation, bias=bias, experts=experts)


def layer(dtype=torch.float32, seed=0, **settings):
    built = MoE(model_of(**settings)).to(dtype)
    draw = torch.Generator().manual_seed(seed)
    for p in built.parameters():
        nn.init.normal_(p, std=0.5, generator=draw)
    return built


def inputs(dtype=torch.float32, seed=1, rows=B):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(rows, S, E, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(y, *of):
    return torch.autograd.grad(y, of, torch.linspace(-1, 1, y.numel()).to(y.dtype).view_as(y))


def close(ours, theirs):
    """Outputs and gradients of order ten: fp32, sums of up to 20 x 42 terms."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


def test_mixtral():
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    ours, x = layer(top_k=2), inputs()
    theirs = MixtralSparseMoeBlock(
        MixtralConfig(hidden_size=E, intermediate_size=F, num_local_experts=X, num_experts_per_tok=2)
    ).eval()
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.gate, ours.up], 1))
        theirs.experts.down_proj.copy_(ours.down)
    y, expected = ours(x, None)[0], theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    g = gradients(y, x, ours.router.weight, ours.gate, ours.up, ours.down)
    dx, drouter, dgate_up, ddown = gradients(
        expected, x, theirs.gate.weight, theirs.experts.gate_up_proj, theirs.experts.down_proj
    )
    close(g, (dx, drouter, dgate_up[:, :F], dgate_up[:, F:], ddown))


@pytest.mark.parametrize("capacity", [0.9, 100.0])
def test_switch(capacity):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersSparseMLP,
    )

    ours, x = layer(activation="relu", top_k=1, normalise=False, capacity=capacity), inputs()
    places = -int(-S * capacity // X)
    theirs = SwitchTransformersSparseMLP(
        SwitchTransformersConfig(d_model=E, d_ff=F, num_experts=X, expert_capacity=places, num_layers=1)
    ).eval()
    with torch.no_grad():
        theirs.router.classifier.weight.copy_(ours.router.weight)
        for i in range(X):
            theirs.experts[f"expert_{i}"].wi.weight.copy_(ours.up[i])
            theirs.experts[f"expert_{i}"].wo.weight.copy_(ours.down[i])
    y, expected = ours(x, None)[0], theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    ups = [theirs.experts[f"expert_{i}"].wi.weight for i in range(X)]
    dx, drouter, *dups = gradients(expected, x, theirs.router.classifier.weight, *ups)
    close(gradients(y, x, ours.router.weight, ours.up), (dx, drouter, torch.stack(dups)))


def test_deepseek():
    """Sigmoid scores, bias of selection, experts that all tokens pass."""
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    ours, x = layer(top_k=3, score="sigmoid", shared=2, bias_rate=0.01), inputs()
    theirs = DeepseekV3MoE(
        DeepseekV3Config(
            hidden_size=E,
            moe_intermediate_size=F,
            n_routed_experts=X,
            num_experts_per_tok=3,
            n_shared_experts=2,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=1.0,
        )
    ).eval()
    with torch.no_grad():
        ours.balance_bias.uniform_(-0.4, 0.4)
        theirs.gate.e_score_correction_bias.copy_(ours.balance_bias)
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.gate, ours.up], 1))
        theirs.experts.down_proj.copy_(ours.down)
        for name in ("gate", "up", "down"):
            getattr(theirs.shared_experts, f"{name}_proj").weight.copy_(getattr(ours.shared, name).weight)
    y, expected = ours(x, None)[0], theirs(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-4)
    close(gradients(y, x, ours.router.weight), gradients(expected, x, theirs.gate.weight))


def test_rebalance():
    """b += rate sign(mean - load): Wang et al. 2024, algorithm 1."""
    built = layer(bias_rate=0.25)
    assert "balance_bias" in built.state_dict()
    load = torch.tensor([3.0, 9.0, 6.0, 0.0, 12.0, 6.0])
    built.rebalance(load)
    built.rebalance(load)
    assert built.balance_bias.tolist() == [0.5, -0.5, 0, 0.5, -0.5, 0]
    assert "balance_bias" not in layer().state_dict()


SETTINGS = [
    {"top_k": 2},
    {"top_k": 1, "capacity": 0.7, "normalise": False},
    {"top_k": 3, "capacity": 1.2, "score": "sigmoid", "bias_rate": 0.1},
    {"routing": "experts", "capacity": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kernel", ["reference", "grouped", "batched"])
def test_rows_are_independent(settings, kernel):
    if kernel == "batched" and "capacity" not in settings:
        pytest.skip("refused: test_kernels_that_cannot")
    built = layer(torch.float64, kernel=kernel, bias=True, **settings)
    x, valid = inputs(torch.float64), torch.arange(S) < torch.tensor([[9], [S], [4]])
    y, side = built(x, None, valid)
    for b in range(B):
        alone, beside = built(x[b : b + 1], None, valid[b : b + 1])
        torch.testing.assert_close(alone[0], y[b], rtol=1e-12, atol=1e-12)
        for name in side:
            torch.testing.assert_close(beside[name][0], side[name][b], rtol=1e-12, atol=1e-12)
    assert not y[~valid].any()  # no shared experts here: padding gets nothing


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kernels_agree(settings, dtype):
    kernels = ["reference", "grouped"] + ["batched"] * ("capacity" in settings)
    x, valid = inputs(dtype), torch.rand(B, S, generator=torch.Generator().manual_seed(3)) < 0.8
    results = []
    for kernel in kernels:
        built = layer(dtype, kernel=kernel, bias=True, **settings)
        y, side = built(x, None, valid)
        loss = y.square().mean() + side["balance"].mean() + side["router_z"].mean()
        results.append((y, *torch.autograd.grad(loss, [x, *built.parameters()])))
    eps = 1000 * torch.finfo(dtype).eps  # outputs of order ten, sums of some hundred terms
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=eps, atol=eps)


@pytest.mark.parametrize("kernel", ["reference", "grouped", "batched"])
def test_an_expert_without_tokens_has_zero_gradients(kernel):
    built, x = layer(kernel=kernel, bias=True, top_k=1, normalise=False, capacity=2.0), inputs()
    with torch.no_grad():
        x[..., 0], built.router.weight[4] = 1, 0
        built.router.weight[4, 0] = -100
    y, side = built(x, None)
    assert not side["load"][:, 4].any()
    y.square().sum().backward()
    for name, p in built.named_parameters():
        assert p.grad.isfinite().all(), name
        if not name.startswith("router"):
            assert not p.grad[4].any(), name
            assert p.grad.any(), name


def test_causal_with_capacity():
    """What is dropped does not depend on later tokens, so a decoder does not look ahead."""
    built, x = layer(torch.float64, top_k=2, capacity=0.8), inputs(torch.float64).detach()
    y, side = built(x, None)
    assert side["dropped"].all()
    changed = x.clone()
    changed[:, 8:] = inputs(torch.float64, seed=9)[:, 8:].detach()
    torch.testing.assert_close(built(changed, None)[0][:, :8], y[:, :8], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kernel", ["reference", "grouped", "batched"])
def test_autocast(kernel):
    """The router stays in fp32 under bf16, so routing is that of fp32; experts are computed in bf16."""
    built, x = layer(kernel=kernel, bias=True, capacity=1.0, shared=1), inputs()
    expected, side = built(x, None)
    with torch.autocast("cpu", torch.bfloat16):
        y, narrow = built(x, None)
    assert y.dtype == torch.bfloat16
    assert all(v.dtype == torch.float32 for v in narrow.values())
    torch.testing.assert_close(narrow, side, rtol=0, atol=0)
    # Three products of bf16 (8 bits) and sums of order ten.
    assert (y - expected).norm() < 0.02 * expected.norm()
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in built.parameters())


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", [SETTINGS[0], SETTINGS[2], SETTINGS[3], {"capacity": 1.0, "kernel": "batched"}]
)
def test_compiled(settings):
    """One graph, whatever the loads are."""
    torch.compiler.reset()
    built = layer(jitter=0.1, bias=True, **settings)
    noise = Noise.at(0, 1, torch.arange(B))
    compiled = torch.compile(built, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in (1, 2):
            x = inputs(seed=seed)
            (y, side), (expected, same) = compiled(x, noise), built(x, noise)
            close(y, expected)
            torch.testing.assert_close(side, same)
            close(gradients(y, x, built.up), gradients(expected, x, built.up))


def test_jitter():
    """Uniform in 1 +- jitter, by the coordinates of an element."""
    built = MoE(model_of(jitter=0.25))
    initialise(built, model_of(), seed=0)
    noise = Noise.at(0, 3, torch.arange(40))
    ones = torch.ones(40, S, E, dtype=torch.float64)
    factors = built.jitter(ones, noise)
    assert factors.shape == ones.shape
    assert 0.75 < factors.min() < 0.76
    assert 1.24 < factors.max() < 1.25
    assert len(factors.unique()) == factors.numel()
    n = factors.numel()
    assert abs(factors.mean() - 1) < 4 * 0.25 / (3 * n) ** 0.5  # four deviations
    part = built.jitter(ones[5:7, 2:9], Noise(noise.key, torch.tensor([5, 6]), torch.arange(2, 9)))
    assert torch.equal(part, factors[5:7, 2:9])
    assert not torch.equal(built.jitter(ones, Noise.at(0, 4, torch.arange(40))), factors)
    assert built.jitter(ones, None) is ones
    y, _ = built(ones.float(), None)
    assert not torch.equal(y, built(ones.float(), noise)[0])


def test_kernels_that_cannot():
    with pytest.raises(JobError, match=r"model\.experts\.kernel = 'batched': padded batches need .*grouped"):
        MoE(model_of(kernel="batched"))


def test_names():
    names = {n: tuple(p.shape) for n, p in layer(bias=True, shared=2).named_parameters() if "shared" not in n}
    assert names == {
        "router.weight": (X, E),
        "up": (X, F, E),
        "gate": (X, F, E),
        "down": (X, E, F),
        "up_bias": (X, F),
        "gate_bias": (X, F),
        "down_bias": (X, E),
    }
    assert layer(shared=2).shared.up.weight.shape == (2 * F, E)
