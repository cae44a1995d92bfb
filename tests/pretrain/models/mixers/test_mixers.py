"""What all mixers share: costs that two places state, models of every family that they suit, refusals."""

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import mechanism
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.attention import attention_shape
from headway.pretrain.models.cost import total
from headway.pretrain.models.gpt import GPT
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.models.mixers import MIXERS, build_mixer
from headway.pretrain.models.seat import Seat
from headway.pretrain.models.transformer import Context
from headway.pretrain.objectives import build_objective

WORDS = ("mla", "hyena", "monarch", "induced", "perceiver")


def model_of(word, **model):
    return config.Model(
        hidden=24, heads=4, layers=2, positions="none", attention=config.Attention(mechanism=word)
    ).model_copy(update=model)


@pytest.mark.parametrize("tokens", [16, 37])
@pytest.mark.parametrize("word", WORDS)
def test_rows_and_modules_say_the_same_flops(word, tokens):
    for changed in ({}, {"kv_heads": 2}, {"bias": False, "head_dim": 10, "ffn": 50}):
        model, row = model_of(word, **changed), mechanism(word)
        seat = Seat(0, "causal" in row.supports, tokens=tokens)
        shape = attention_shape(model, word, seat)
        parts = total(MIXERS[word].parts(model, seat, shape.settings))
        assert parts.flops == pytest.approx(row.flops(shape), rel=1e-12)
        built = build_mixer(model, seat)
        assert parts.parameters == sum(p.numel() for p in built.parameters())
        assert row.bytes(shape, 4) == 2 * row.bytes(shape, 2) > 0
        assert row.state(shape) > 0


def test_costs_by_hand():
    shapes = {word: attention_shape(model_of(word), word, Seat(tokens=16)) for word in WORDS}
    e, n, m = 24, 16, 32
    # q of 4 x (6 + 2), latent 24, shared key 2, k and v, o; products of 8 and sums of 6 features for 256 pairs.
    latent = n * (e * 32 + e * 24 + e * 2 + 2 * 24 * 24 + 24 * e) + 4 * 256 * (8 + 6)
    assert mechanism("mla").flops(shapes["mla"]) == 2 * latent
    assert mechanism("mla").state(shapes["mla"]) == n * (24 + 2)
    assert mechanism("monarch").flops(shapes["monarch"]) == 2 * (4 * n * e * e + 2 * 4**3 * e)
    read, write = 2 * m * e * e + 2 * n * e * e, 2 * n * e * e + 2 * m * e * e
    assert mechanism("induced").flops(shapes["induced"]) == 2 * (read + write + 4 * e * n * m + m * e * e)


FAMILIES = {
    "mla": ("gpt", "bert", "vit", "t5"),
    "hyena": ("gpt",),
    "monarch": ("bert", "vit"),
    "induced": ("bert", "vit"),
    "perceiver": ("bert", "vit"),
}


@pytest.mark.parametrize(("word", "family"), [(w, f) for w, all_of in FAMILIES.items() for f in all_of])
def test_blocks_of_every_family_that_it_suits_learn(word, family):
    objective = {"gpt": "causal", "bert": "masked", "t5": "spans", "vit": "classify"}[family]
    documents = "isolate" if word == "mla" and family in ("gpt", "bert") else "attend"
    job = config.Job(
        model=model_of(word, family=family),
        objective=config.Objective(name=objective),
        data=config.Data(seq_len=32, documents=documents),
    )
    built = build_objective(job, Inputs(61, 17 if family == "vit" else 32, 9, 32, 3, 5))
    initialise(built, job.model, seed=0)
    towers = [built.model.encoder, built.model.decoder] if family == "t5" else [built.model]
    for tower in towers:
        block, length = tower.blocks[1], 9 if tower.causal and family == "t5" else 17
        assert type(block.attention) is MIXERS[word]
        x = torch.randn(2, length, 24)
        memory = torch.randn(2, 32, 24) if family == "t5" and tower.causal else None
        y, _ = block(x, Context(Mask(tower.causal), memory_BME=memory))
        assert y.shape == x.shape
        y.square().sum().backward()
        still = [n for n, p in block.named_parameters() if p.grad is None or not p.grad.any()]
        assert all(n.endswith("k.bias") for n in still)  # a bias of all keys shifts a row's scores alike


@pytest.mark.parametrize(
    ("word", "family", "rule"),
    [
        ("hyena", "bert", "encoder needs attention to both sides"),
        ("monarch", "gpt", "causal"),
        ("induced", "gpt", "causal"),
        ("perceiver", "t5", "causal"),
        ("hyena", "gpt", "documents"),
    ],
)
def test_what_cannot_be_is_refused(word, family, rule):
    with pytest.raises(JobError, match=rule):
        config.Job(
            model=model_of(word, family=family),
            objective=config.Objective(name={"gpt": "causal", "bert": "masked", "t5": "spans"}[family]),
            data=config.Data(seq_len=32, documents="isolate" if rule == "documents" else "attend"),
        )


@pytest.mark.parametrize("word", WORDS)
def test_columns_of_a_sequence_are_not_enough(word):
    layer = build_mixer(model_of(word), Seat(tokens=16))
    with pytest.raises(AssertionError, match="all columns"):
        layer(torch.randn(1, 8, 24), Mask(False, split=(16, 16)))


@pytest.mark.parametrize(("pattern", "layers"), [(("hyena", "mla"), 2), (("hyena",), 0)])
def test_maps_are_of_the_layers_that_have_weights(pattern, layers):
    attention = config.Attention(pattern=pattern)
    model = model_of("dense", layers=4, attention=attention)
    gpt = GPT(model, Inputs(31, 12))
    initialise(gpt, model, seed=0)
    maps = attention_maps(gpt, torch.arange(24).view(2, -1))
    assert len(maps) == layers
    assert layers == 0 or maps.shape == (2, 2, 4, 12, 12)
