"""Blocks: compiled once for all, dropout by coordinates, low precision."""

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.transformer import Tower
from headway.pretrain.objectives import build_objective

VOCAB, LENGTH = 61, 16


def objective(layers=3, dropout=0.0, **model):
    shape = config.Model(
        layers=layers,
        hidden=32,
        heads=4,
        dropout=dropout,
        attention=config.Attention(dropout=dropout),
        **model,
    )
    return build_objective(config.Job(model=shape, data=config.Data(seq_len=LENGTH)), Inputs(VOCAB, LENGTH))


def batch_of(built, rows=4):
    tokens = torch.randint(0, VOCAB, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return built.collate({"tokens": tokens.numpy(), "slot": torch.arange(rows).numpy()})


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_all_blocks_share_one_graph_at_every_step(dropout):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    built = objective(dropout=dropout)
    batch = batch_of(built)
    noises = [Noise.at(0, step, batch["slot"]) for step in range(3)]
    expected = [built(batch, noise).terms["tokens"] for noise in noises]
    for block in built.model.blocks:
        block.compile(fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        got = [built(batch, noise).terms["tokens"] for noise in noises]
        got[0].backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)  # fp32 sums over 64 tokens of 4 nats


def test_dropout_does_not_depend_on_micro_batches():
    built = objective(dropout=0.3)
    batch = batch_of(built)
    whole = built(batch, Noise.at(0, 7, batch["slot"]))
    gradient = torch.autograd.grad(whole.terms["tokens"], built.model.embed.tokens.weight)[0]
    total, pieces = torch.zeros(()), torch.zeros_like(gradient)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {k: v[rows] for k, v in batch.items()}
        out = built(part, Noise.at(0, 7, part["slot"]))
        total, pieces = (
            total + out.terms["tokens"],
            pieces + torch.autograd.grad(out.terms["tokens"], built.model.embed.tokens.weight)[0],
        )
    torch.testing.assert_close(total, whole.terms["tokens"], rtol=1e-6, atol=1e-4)
    torch.testing.assert_close(pieces, gradient, rtol=1e-4, atol=1e-5)


def test_dropout_changes_with_step_and_seed_and_rests_without_noise():
    built = objective(dropout=0.3)
    batch = batch_of(built)
    values = [
        built(batch, Noise.at(seed, step, batch["slot"])).terms["tokens"]
        for seed, step in ((0, 1), (0, 2), (1, 1), (0, 1))
    ]
    assert values[0] == values[3]
    assert len({v.item() for v in values}) == 3
    torch.testing.assert_close(built(batch).terms["tokens"], objective(dropout=0.0)(batch).terms["tokens"])


def test_every_dropout_has_its_own_mask():
    built = objective(dropout=0.5)
    noise = Noise.at(0, 0, torch.arange(2))
    block, other = built.model.blocks[:2]
    sites = [built.model.embed.dropout, block.attention_dropout, block.mlp_dropout, other.mlp_dropout]
    masks = [site(torch.ones(2, LENGTH, 32), noise) != 0 for site in sites]
    # Independent masks agree in half of 1,024 places; five deviations are 80.
    for i, a in enumerate(masks):
        assert all(abs((a == b).sum() - 512) < 80 for b in masks[i + 1 :])


def test_bf16_autocast_keeps_the_residual_stream_wide():
    built = objective()
    batch = batch_of(built)
    with torch.autocast("cpu", torch.bfloat16):
        assert built.model(batch["tokens"]).final.dtype == torch.float32
        low = built(batch)
    assert low.terms["tokens"].dtype == torch.float32
    # 64 tokens near log 61 nats; logits of order 0.1 carry a bf16 rounding of 2^-9 each.
    torch.testing.assert_close(low.terms["tokens"], built(batch).terms["tokens"], rtol=1e-3, atol=0)


def test_bf16_weights_without_autocast():
    built = objective(norm="rmsnorm", positions="rotary", activation="swiglu").bfloat16()
    out = built(batch_of(built))
    out.terms["tokens"].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in built.parameters())


@pytest.mark.parametrize(
    ("positions", "mechanism"),
    [
        ("rotary", "dense"),
        ("relative", "dense"),
        ("none", "dense"),
        *(("rotary", word) for word in ("topk", "routing", "span", "hierarchical", "logtime")),
    ],
)
def test_fewer_outputs_are_the_first_of_all(positions, mechanism):
    """The last block answers the places that are asked, by keys and values of all; earlier blocks answer all."""
    torch.manual_seed(0)
    shape = config.Model(
        family="t5",
        layers=3,
        hidden=32,
        heads=4,
        dropout=0.2,
        positions=positions,
        norm="rmsnorm",
        attention=config.Attention(mechanism=mechanism),
    )
    tower = Tower(shape, causal=False).double()
    for p in tower.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x, noise = torch.randn(4, LENGTH, 32, dtype=torch.float64), Noise.at(0, 1, torch.arange(4))
    every, some = (
        tower.run(x, Columns(torch.arange(LENGTH)), Mask(False), noise, outputs=outputs)[0]
        for outputs in (None, 3)
    )
    assert some.shape == (4, 3, 32)
    torch.testing.assert_close(some, every[:, :3], rtol=1e-12, atol=1e-12)  # fp64, other shapes of products
