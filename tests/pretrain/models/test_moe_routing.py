"""Routing and its losses against transformers, megatron-core, and loops over tokens in fp64."""

import math

import pytest
import torch

from headway.pretrain import config
from headway.pretrain.models.routing import route

X = 8


def logits_of(rows=3, tokens=20, experts=X, seed=0):
    return torch.randn(rows, tokens, experts, generator=torch.Generator().manual_seed(seed))


def dense(pairs, rows, tokens, experts=X):
    """Pairs as megatron-core has them: weights and a map, [B, S, X]."""
    flat = pairs.token_P * (experts + 1) + pairs.expert_P
    size = rows * tokens * (experts + 1)
    weights = pairs.weight_P.new_zeros(size).index_add(0, flat, pairs.weight_P)
    chosen = torch.zeros(size).index_add(0, flat, torch.ones(len(flat)))
    weights, chosen = (t.view(rows, tokens, experts + 1)[..., :experts] for t in (weights, chosen))
    return weights * (chosen > 0), chosen > 0


def run(logits, valid=None, bias=None, **settings):
    experts = config.Experts(count=logits.shape[-1], **settings)
    if valid is None:
        valid = torch.ones(logits.shape[:2], dtype=torch.bool)
    return route(logits, experts, valid, bias)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("score", ["softmax", "softmax, unnormalised", "sigmoid", "sigmoid, biased"])
def test_top_k_is_megatrons(k, score):
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = logits_of()
    bias = torch.linspace(-0.3, 0.3, X) if "biased" in score else None
    name, normalise = score.split(",")[0], "unnormalised" not in score
    if k == 1 and name == "sigmoid":
        normalise = False  # megatron-core does not normalise one weight
    pairs, _ = run(logits, bias=bias, top_k=k, score=name, normalise=normalise)
    theirs = topk_routing_with_score_function(
        logits.flatten(0, 1), k, use_pre_softmax=not normalise, score_function=name, expert_bias=bias
    )
    weights, chosen = dense(pairs, *logits.shape[:2])
    torch.testing.assert_close(weights.flatten(0, 1), theirs[0])
    assert torch.equal(chosen.flatten(0, 1), theirs[1])


def test_bias_is_deepseeks():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    shape = {
        "hidden_size": 12,
        "n_routed_experts": X,
        "num_experts_per_tok": 3,
        "n_group": 1,
        "topk_group": 1,
    }
    theirs = DeepseekV3TopkRouter(DeepseekV3Config(**shape, routed_scaling_factor=1.0, norm_topk_prob=True))
    with torch.no_grad():
        theirs.weight.normal_()
        theirs.e_score_correction_bias.uniform_(-0.5, 0.5)
    logits, weight, index = theirs(torch.randn(2, 10, 12))
    pairs, _ = run(logits.view(2, 10, X), bias=theirs.e_score_correction_bias, top_k=3, score="sigmoid")
    expected = torch.zeros(20, X).scatter(1, index, weight)
    torch.testing.assert_close(dense(pairs, 2, 10)[0].flatten(0, 1), expected)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("capacity", [0.4, 1.0, 1.25, 100.0])
def test_capacity_drops_later_tokens(k, capacity):
    logits = logits_of()
    logits[1, :, 2] += 4  # a popular expert
    valid = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.8
    pairs, side = run(logits, valid, top_k=k, capacity=capacity)
    chosen = dense(pairs, 3, 20)[1]
    wanted = logits.topk(k).indices
    for b in range(3):
        limit = math.ceil(int(valid[b].sum()) * k / X * capacity)
        load = torch.zeros(X)
        for s in range(20):
            for x in wanted[b, s]:
                takes = bool(valid[b, s]) and load[x] < limit
                assert bool(chosen[b, s, x]) == takes
                load[x] += takes
        assert torch.equal(side["load"][b], load)
        assert side["dropped"][b] == k * valid[b].sum() - load.sum()


@pytest.mark.parametrize("capacity", [0.5, 1.0])
def test_as_many_are_dropped_as_megatron_drops(capacity):
    """Its policy "position" leaves open which of equals `topk` returns, so loads are compared."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    logits = logits_of(rows=1, tokens=40)
    weights, chosen = dense(run(logits, top_k=2)[0], 1, 40)
    _, kept = apply_router_token_dropping(weights[0], chosen[0], 2, capacity, drop_policy="position")
    assert torch.equal(run(logits, top_k=2, capacity=capacity)[1]["load"][0], kept.sum(0).float())


def test_capacity_of_one_expert_is_switchs():
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import (
        SwitchTransformersTop1Router,
    )

    theirs = SwitchTransformersTop1Router(
        SwitchTransformersConfig(d_model=12, num_experts=X, expert_capacity=3, num_layers=1)
    ).eval()
    index, probability, logits = theirs(torch.randn(3, 20, 12))
    pairs, _ = run(logits, top_k=1, normalise=False, capacity=3 * X / 20)
    weights, chosen = dense(pairs, 3, 20)
    assert torch.equal(chosen, index.bool())
    torch.testing.assert_close(weights, index * probability)


@pytest.mark.parametrize("capacity", [None, 0.5, 2.0])
@pytest.mark.parametrize("k", [1, 2])
def test_expert_choice_is_megatrons(capacity, k):
    """With a map of ones, its policy "probs" is expert choice."""
    from megatron.core.transformer.moe.moe_utils import apply_router_token_dropping

    logits = logits_of()
    pairs, side = run(logits, routing="experts", top_k=k, capacity=capacity, normalise=False)
    weights, chosen = dense(pairs, 3, 20)
    for b in range(3):
        scores = logits[b].softmax(-1)
        theirs, kept = apply_router_token_dropping(
            scores, torch.ones_like(scores, dtype=torch.bool), k, capacity or 1.0
        )
        assert torch.equal(chosen[b], kept)
        torch.testing.assert_close(weights[b], theirs)
        assert torch.equal(side["load"][b], kept.sum(0).float())
    assert not side["dropped"].any()


def test_expert_choice_normalised():
    pairs, _ = run(logits_of(), routing="experts", capacity=1.5)
    weights, chosen = dense(pairs, 3, 20)
    torch.testing.assert_close(weights.sum(-1), chosen.any(-1).float())


@pytest.mark.parametrize("routing", ["tokens", "experts"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_padding_does_not_matter(routing, score):
    """A row with padding is routed as without it, wherever the padding stands and whatever it holds."""
    logits, valid = logits_of(rows=1), torch.ones(1, 20, dtype=torch.bool)
    valid[0, [0, 7, 8, 18, 19]] = False
    short = logits[:, valid[0]]
    settings = {"routing": routing, "score": score, "capacity": 0.8}
    logits = torch.where(valid[..., None], logits, 50.0)
    (padded, side), (plain, expected) = run(logits, valid, **settings), run(short, **settings)
    for a, b in zip(dense(padded, 1, 20), dense(plain, 1, 15), strict=True):
        torch.testing.assert_close(a[:, valid[0]], b)
        assert not a[:, ~valid[0]].any()
    for name in expected:
        torch.testing.assert_close(side[name], expected[name], msg=name)


def test_a_row_of_padding_counts_nothing():
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1] = False
    for routing in ("tokens", "experts"):
        logits = logits_of(rows=2).requires_grad_()
        pairs, side = run(logits, valid, routing=routing, capacity=1.0)
        assert not dense(pairs, 2, 20)[1][1].any()
        assert not any(v[1].any() for v in side.values())
        (side["balance"] + side["router_z"]).sum().backward()
        assert logits.grad.isfinite().all()
        assert not logits.grad[1].any()


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_losses_are_megatrons(k, score):
    from megatron.core.transformer.moe.moe_utils import (
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
        z_loss_func,
    )

    logits = logits_of().requires_grad_()
    valid = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.7
    bias = torch.linspace(-0.4, 0.4, X)  # of selection: the loss balances what the router itself prefers
    _, side = run(logits, valid, bias=bias, top_k=k, score=score)
    total = (side["balance"] + 0.1 * side["router_z"]).sum()
    expected = 0
    for b in range(3):
        padding = ~valid[b]
        chosen, scores = compute_routing_scores_for_aux_loss(logits[b], k, score, padding_mask=padding)
        expected = expected + switch_load_balancing_loss_func(
            scores, chosen.sum(0), valid[b].sum(), k, X, 1.0
        )
        expected = expected + z_loss_func(logits[b], 0.1, padding_mask=padding)
    torch.testing.assert_close(total, expected)
    ours, theirs = (torch.autograd.grad(t, logits, retain_graph=True)[0] for t in (total, expected))
    torch.testing.assert_close(ours, theirs)


def test_balance_is_switchs_and_mixtrals():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = logits_of(rows=1)
    one = load_balancing_loss_func((logits[0],), X, 1)
    two = load_balancing_loss_func((logits[0],), X, 2) / 2  # Mixtral's is not divided by k
    torch.testing.assert_close(run(logits, top_k=1)[1]["balance"][0], one)
    torch.testing.assert_close(run(logits, top_k=2)[1]["balance"][0], two)


@pytest.mark.parametrize("routing", ["tokens", "experts"])
def test_a_uniform_router(routing):
    side = run(torch.zeros(2, 16, X), routing=routing)[1]
    torch.testing.assert_close(side["balance"], torch.ones(2))
    torch.testing.assert_close(side["router_entropy"], torch.full((2,), math.log(X)))
    torch.testing.assert_close(side["router_z"], torch.full((2,), math.log(X) ** 2))


def test_entropy():
    logits = logits_of().double()
    expected = torch.distributions.Categorical(logits=logits).entropy().mean(1)
    side = run(logits.requires_grad_())[1]
    torch.testing.assert_close(side["router_entropy"], expected, rtol=1e-12, atol=1e-12)
    assert [k for k, v in side.items() if v.requires_grad] == ["balance", "router_z"]
