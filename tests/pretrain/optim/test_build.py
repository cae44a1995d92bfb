"""Which parameter is moved how."""

import pytest
import torch
from torch import nn

from headway.pretrain.config import Optimizer
from headway.pretrain.optim.adafactor import Adafactor
from headway.pretrain.optim.build import build_optimizers, set_rate
from headway.pretrain.optim.lamb import Lamb


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 32)
        self.down = nn.Linear(32, 8, bias=False)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(50, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.tokens.weight


def names(group):
    return set(group["param_names"])


def test_adamw_decays_matrices_and_spares_vectors():
    (optimizer,) = build_optimizers(Model().named_parameters(), Optimizer(lr=1e-3, weight_decay=0.1))
    assert isinstance(optimizer, torch.optim.AdamW)
    assert optimizer.defaults["fused"]
    by_decay = {group["weight_decay"]: names(group) for group in optimizer.param_groups}
    assert by_decay == {
        0.1: {"tokens.weight"} | {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")},
        0.0: {f"blocks.{i}.{n}" for i in (0, 1) for n in ("norm.weight", "norm.bias", "up.bias")},
    }


def test_muon_moves_hidden_matrices_and_adamw_the_rest():
    settings = Optimizer(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1, momentum=0.9)
    muon, adamw = build_optimizers(Model().named_parameters(), settings)
    (group,) = muon.param_groups
    assert names(group) == {f"blocks.{i}.{n}.weight" for i in (0, 1) for n in ("up", "down")}
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.02, 0.1, 0.9)
    rest = {name: group["weight_decay"] for group in adamw.param_groups for name in names(group)}
    assert rest.pop("tokens.weight") == 0.1
    assert set(rest.values()) == {0.0}
    assert len(rest) == 6


def test_every_parameter_is_moved_once_and_frozen_ones_are_not():
    model = Model()
    model.blocks[0].up.weight.requires_grad_(False)
    for name in ("adamw", "muon", "lamb", "adafactor"):
        optimizers = build_optimizers(model.named_parameters(), Optimizer(name=name))
        moved = [p for o in optimizers for g in o.param_groups for p in g["params"]]
        assert len({id(p) for p in moved}) == len(moved)
        assert {id(p) for p in moved} == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_schedule_scales_each_groups_own_rate():
    optimizers = build_optimizers(Model().named_parameters(), Optimizer(name="muon", lr=1e-3, muon_lr=0.02))
    for factor in (0.5, 0.25):  # from the base rate each time
        set_rate(optimizers, factor)
        assert [g["lr"] for o in optimizers for g in o.param_groups] == [
            pytest.approx(0.02 * factor),
            pytest.approx(1e-3 * factor),
            pytest.approx(1e-3 * factor),
        ]


@pytest.mark.parametrize(("name", "kind"), [("lamb", Lamb), ("adafactor", Adafactor)])
def test_lamb_and_adafactor_decay_what_adamw_decays(name, kind):
    settings = Optimizer(name=name, lr=1e-3, weight_decay=0.1, betas=(0.8, 0.9), eps=1e-5)
    (optimizer,) = build_optimizers(Model().named_parameters(), settings)
    (adamw,) = build_optimizers(Model().named_parameters(), Optimizer(lr=1e-3, weight_decay=0.1))
    assert type(optimizer) is kind
    for group, expected in zip(optimizer.param_groups, adamw.param_groups, strict=True):
        assert names(group) == names(expected)
        for key in ("lr", "base_lr", "weight_decay"):
            assert group[key] == expected[key]
        if kind is Lamb:
            assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-5)
            assert group["adapt"] == (group["weight_decay"] > 0)


def test_lamb_adapts_matrices_also_where_nothing_decays():
    (optimizer,) = build_optimizers(Model().named_parameters(), Optimizer(name="lamb", weight_decay=0))
    assert {group["adapt"]: "tokens.weight" in names(group) for group in optimizer.param_groups} == {
        True: True,
        False: False,
    }


@pytest.mark.parametrize("name", ["adamw", "muon", "lamb", "adafactor"])
def test_layer_decay_scales_every_groups_base_rate(name):
    settings = Optimizer(name=name, lr=1e-3, muon_lr=0.02, layer_decay=0.5)
    model = Model()
    named = {f"{'embed.' * n.startswith('tokens')}{n}": p for n, p in model.named_parameters()}
    optimizers = build_optimizers(named.items(), settings)
    set_rate(optimizers, 0.5)
    rates = {n: (o, g["base_lr"], g["lr"]) for o in optimizers for g in o.param_groups for n in names(g)}
    assert len(rates) == len(named)
    for key, (optimizer, base, rate) in rates.items():
        top = 0.02 if optimizer is optimizers[0] and name == "muon" else 1e-3
        factor = 1 / 8 if key == "embed.tokens.weight" else 1 / 4 if ".0." in key else 1 / 2
        assert base == pytest.approx(top * factor)
        assert rate == pytest.approx(0.5 * base)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_adamw_steps_are_the_papers(dtype):
    """Loshchilov and Hutter 2019, algorithm 2, in a few lines."""
    torch.manual_seed(0)
    model = Model().to(dtype)
    settings = Optimizer(lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    (optimizer,) = build_optimizers(model.named_parameters(), settings)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in expected.items()}
    v = {name: torch.zeros_like(p) for name, p in expected.items()}
    for t in range(1, 5):
        for name, p in model.named_parameters():
            p.grad = torch.randn_like(p)
            g = p.grad.double()
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g**2
            decay = 0.1 if p.ndim >= 2 else 0.0
            step = m[name] / (1 - 0.9**t) / ((v[name] / (1 - 0.95**t)).sqrt() + 1e-8)
            expected[name] -= 1e-2 * (step + decay * expected[name])
        optimizer.step()
    # A handful of roundings a step on weights of size 1.
    for name, p in model.named_parameters():
        torch.testing.assert_close(
            p.double(), expected[name], rtol=0, atol=2e-6 if dtype == torch.float32 else 1e-13
        )
