"""LSUV: unit variance layer by layer, the same however the batch is cut."""

import pytest
import torch

from headway.pretrain import config
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.lsuv import lsuv
from headway.pretrain.objectives import build_objective

MODEL = config.Model(
    layers=3, hidden=32, heads=4, norm="layernorm", init=config.Init(scheme="orthogonal", lsuv=True)
)
JOB = config.Job(model=MODEL, data=config.Data(seq_len=16), precision="fp64")
INPUTS = Inputs(vocab=50, length=16)
TOKENS = torch.randint(50, (12, 16), generator=torch.Generator().manual_seed(0))


def built():
    return build_objective(JOB, INPUTS)


def outputs(objective, name):
    seen = []
    handle = objective.get_submodule(name).register_forward_hook(lambda *a: seen.append(a[2]))
    objective.model(TOKENS)
    handle.remove()
    return torch.cat(seen)


def test_variances_are_one_afterwards_in_order_of_execution():
    objective = built()
    variances = lsuv(objective, lambda: objective.model(TOKENS))
    layers = [*(f"attention.{p}" for p in "qkvo"), "mlp.up", "mlp.down"]
    names = [f"model.blocks.{block}.{layer}" for block in range(3) for layer in layers]
    assert list(variances) == names
    for name in names:
        assert abs(outputs(objective, name).var(correction=0).item() - 1) < 1e-3, name
        assert abs(variances[name] - 1) < 1e-3


def test_only_scales_change_and_heads_stay():
    objective, before = built(), built()
    lsuv(objective, lambda: objective.model(TOKENS))
    scales = []
    for (name, after), first in zip(objective.named_parameters(), before.parameters(), strict=True):
        if "blocks" in name and name.endswith("weight") and after.dim() == 2:
            ratio = after / first
            torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-12, atol=0)
            scales.append(ratio.flatten()[0].item())
        else:
            assert torch.equal(after, first), name
    assert max(scales) > 2  # what GELU, attention and norms take away


def test_micro_batches_agree_with_one_batch():
    whole, cut = built(), built()
    lsuv(whole, lambda: whole.model(TOKENS))

    def forward():
        for rows in (TOKENS[:3], TOKENS[3:5], TOKENS[5:]):
            cut.model(rows)

    lsuv(cut, forward)
    for (name, a), b in zip(whole.named_parameters(), cut.parameters(), strict=True):
        # Sums in another order: a few roundings of fp64 a layer.
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0, msg=name)


def test_statistics_are_those_that_are_reduced():
    objective = built()

    def reduce(sums):
        count, total, squares = sums
        return [count, total, squares + 3 * count]  # as if other ranks had seen more

    variances = lsuv(objective, lambda: objective.model(TOKENS), reduce, iterations=0)
    for name, variance in lsuv(objective, lambda: objective.model(TOKENS), iterations=0).items():
        assert variances[name] == pytest.approx(variance + 3, rel=1e-12)


def test_layers_without_output_are_left_alone():
    objective = built()
    with torch.no_grad():
        objective.model.blocks[0].mlp.up.weight.zero_()
    variances = lsuv(objective, lambda: objective.model(TOKENS))
    assert variances["model.blocks.0.mlp.up"] == 0
    assert all(p.isfinite().all() for p in objective.parameters())
