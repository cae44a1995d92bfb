"""Schemes of initial weights against torch.nn.init, and against what transformers and timm give their own models."""

import math

import pytest
import torch
from torch import nn

from headway.pretrain import config
from headway.pretrain.models.init import Slice, fill, initialise, whole
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.schemes import SCHEMES, Fill, rule
from headway.pretrain.objectives import build_objective
from headway.tests import oracles

SHAPE = (200, 300)


def draw(how, shape=SHAPE, seed=0):
    full = torch.empty(shape, dtype=torch.float64)
    fill(whole(full), "name", how, seed)
    return full


def begin(name, shape, **settings):
    model = config.Model(**settings)
    return draw(rule(name, shape, model), shape)


def same_deviation(ours, theirs):
    """Whether two samples have one deviation: those of samples of n and m normal numbers (or of a law with thinner
    tails) have relative errors of at most sqrt(1 / 2n + 1 / 2m); five of them."""
    assert ours.shape == theirs.shape
    bound = 5 * math.sqrt(1 / ours.numel())
    assert abs(ours.std().item() / theirs.double().std().item() - 1) < bound


@pytest.mark.parametrize(
    ("how", "fill_by_torch"),
    [
        (Fill("normal", 0.3), lambda w: nn.init.normal_(w, 0, 0.3)),
        (Fill("truncated", 0.3), lambda w: nn.init.trunc_normal_(w, 0, 0.3, -0.6, 0.6)),
        (Fill("uniform", math.sqrt(6 / 500)), nn.init.xavier_uniform_),
    ],
    ids=lambda x: x.kind if isinstance(x, Fill) else "",
)
def test_distributions_are_torchs(how, fill_by_torch):
    torch.manual_seed(0)
    ours, theirs = draw(how).flatten(), fill_by_torch(torch.empty(SHAPE, dtype=torch.float64)).flatten()
    # Two-sample Kolmogorov-Smirnov: P(sup |F - G| > x sqrt(2 / n)) is about 2 exp(-2 x^2); x = 2.5 gives 7e-6.
    both, signs = torch.cat([ours, theirs]), torch.cat([torch.ones_like(ours), -torch.ones_like(theirs)])
    distance = signs[both.argsort()].cumsum(0).abs().max().item() / ours.numel()
    assert distance < 2.5 * math.sqrt(2 / ours.numel())
    bound = {"truncated": 2 * how.value, "uniform": how.value, "normal": math.inf}[how.kind]
    assert ours.abs().max() <= bound * (1 + 1e-7)  # rounded to fp32


@pytest.mark.parametrize("shape", [(40, 40), (20, 50), (50, 20), (3, 20, 30), (3, 30, 20)])
def test_orthogonal(shape):
    weight = draw(Fill("orthogonal", 1.5), shape)
    gram = weight @ weight.mT if shape[-2] <= shape[-1] else weight.mT @ weight
    identity = torch.eye(gram.shape[-1], dtype=torch.float64).expand_as(gram)
    torch.testing.assert_close(gram, 1.5**2 * identity, rtol=0, atol=1e-12)
    if len(shape) == 3:
        assert not torch.allclose(weight[0], weight[1])


def test_orthogonal_is_uniform_over_rotations():
    # QR alone would leave the signs of the diagonal fixed. Entries have mean 0 and variance 1 / n.
    first = torch.stack([draw(Fill("orthogonal"), (4, 4), seed)[0, 0] for seed in range(400)])
    assert abs(first.mean().item()) < 5 * math.sqrt(1 / 4 / 400)
    assert abs(first.square().mean().item() - 1 / 4) < 5 * math.sqrt(
        1 / 8 / 400
    )  # variance of x^2 is below 2 / n^2


@pytest.mark.parametrize("scheme", SCHEMES)
def test_norms_biases_and_scales_are_alike_everywhere(scheme):
    settings = {"init": config.Init(scheme=scheme), "layer_scale": 1e-4}
    for name in ("model.norm.weight", "model.blocks.0.attention.q_norm.weight", "head.norm.weight"):
        assert (begin(name, (8,), **settings) == 1).all()
    for name in ("pair.bias", "model.blocks.1.mlp.gate_bias", "model.embed.norm.bias", "head.bias"):
        assert (begin(name, (8,), **settings) == 0).all()
    assert (begin("model.blocks.1.mlp.balance_bias", (8,), **settings) == 0).all()
    assert (begin("model.blocks.3.mlp_scale", (8,), **settings) == 1e-4).all()
    assert (begin("model.blocks.3.mlp.up.gain", (1,), **settings) == 1).all()
    direction = begin("model.blocks.3.mlp.up.direction", (50,), **settings)
    assert abs(direction.norm().item() - 1) < 1e-12


T5_NAMES = {
    "shared": "embed.tokens",
    "SelfAttention.relative_attention_bias": "attention.relative",
    "layer.0.SelfAttention": "attention",
    "layer.1.EncDecAttention": "cross",
    "block": "blocks",
    "DenseReluDense.wi_0": "mlp.gate",
    "DenseReluDense.wi_1": "mlp.up",
    "DenseReluDense.wo": "mlp.down",
}


def test_t5_is_transformers():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    shape = {"d_model": 96, "d_kv": 20, "d_ff": 250, "num_heads": 6, "num_layers": 1, "vocab_size": 500}
    theirs = T5ForConditionalGeneration(T5Config(**shape, feed_forward_proj="gated-gelu"))
    ours = {
        "family": "t5", "hidden": 96, "head_dim": 20, "ffn": 250, "heads": 6, "layers": 1, "tied": False,
        "positions": "relative", "attention": config.Attention(scale=1.0), "init": config.Init(scheme="t5"),
    }  # fmt: skip
    checked = 0
    for name, weight in theirs.named_parameters():
        if weight.dim() < 2:
            assert (weight == 1).all()
            continue
        for old, new in T5_NAMES.items():
            name = name.replace(old, new)
        name = name.replace("layer.1.mlp", "mlp").replace("layer.2.mlp", "mlp")
        if "relative" in name:
            name = f"model.{name.split('.')[0]}.relative.table.weight"
        name = name if name.startswith("model.") else f"model.{name}"
        same_deviation(begin(name, weight.shape, **ours), weight)
        checked += 1
    assert checked == 1 + (1 + 4 + 3) + (1 + 8 + 3)  # tokens, encoder, decoder
    # transformers 5 ties every T5's head; `_init_weights` gives an untied one the deviation 1.
    assert rule("head.weight", (500, 96), config.Model(**ours)) == Fill("normal", 1.0)


def test_t5_queries_make_up_for_the_scale_of_scores():
    ours = {
        "family": "t5",
        "hidden": 96,
        "heads": 6,
        "init": config.Init(scheme="t5"),
        "positions": "learned",
    }
    name = "model.encoder.blocks.0.attention.q.weight"
    by_scale = [
        rule(name, (96, 96), config.Model(**ours, attention=config.Attention(scale=s))).value
        * (s or 16**-0.5)
        for s in (None, 1.0, 0.1)
    ]
    assert by_scale == pytest.approx([(96 * 16) ** -0.5] * 3, rel=1e-12)


def test_vit_is_timms():
    torch.manual_seed(0)
    theirs = oracles.timm().models.deit.VisionTransformerDistilled(
        img_size=32, patch_size=8, embed_dim=96, depth=1, num_heads=4, num_classes=300, init_values=1e-5
    )
    names = {
        "cls_token": "model.embed.class_token",
        "dist_token": "model.embed.distill_token",
        "pos_embed": "model.embed.positions.weight",
        "patch_embed.proj.weight": "model.embed.patches.weight",
        "blocks.0.attn.proj.weight": "model.blocks.0.attention.o.weight",
        "blocks.0.mlp.fc1.weight": "model.blocks.0.mlp.up.weight",
        "blocks.0.mlp.fc2.weight": "model.blocks.0.mlp.down.weight",
        "blocks.0.ls1.gamma": "model.blocks.0.attention_scale",
        "head.weight": "head.weight",
        "head_dist.weight": "head_distill.weight",
    }
    ours = {"family": "vit", "hidden": 96, "heads": 4, "init": config.Init(scheme="vit"), "layer_scale": 1e-5}
    weights = dict(theirs.named_parameters())
    for their_name, name in names.items():
        weight = weights[their_name].detach()
        if weight.dim() == 1:
            torch.testing.assert_close(begin(name, weight.shape, **ours).float(), weight, rtol=1e-6, atol=0)
        else:
            weight = (
                weight.reshape(-1, 96) if "token" in their_name or "pos" in their_name else weight.flatten(1)
            )
            same_deviation(begin(name, weight.shape, **ours), weight)
    fused = weights["blocks.0.attn.qkv.weight"].detach()
    for part, layer in zip(fused.chunk(3), "qkv", strict=True):
        same_deviation(begin(f"model.blocks.0.attention.{layer}.weight", part.shape, **ours), part)
    patches = begin("model.embed.patches.weight", (96, 192), **ours)
    assert patches.abs().max() <= 192**-0.5


def test_bert_is_tensorflows_truncated_normal():
    weight = begin("model.embed.tokens.weight", SHAPE, family="bert", init=config.Init(scheme="bert"))
    # Deviation of a normal cut off at 2: sqrt(1 - 4 phi(2) / (Phi(2) - Phi(-2))).
    phi, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
    expected = 0.02 * math.sqrt(1 - 4 * phi / mass)
    assert abs(weight.std().item() / expected - 1) < 5 / math.sqrt(2 * weight.numel())
    assert weight.abs().max() <= 0.04


def deviation(name, shape, **settings):
    how = rule(name, shape, config.Model(init=config.Init(scheme="tfixup"), **settings))
    return how.value / math.sqrt(3) if how.kind == "uniform" else how.value


def test_tfixup_is_section_3_2():
    glorot = math.sqrt(2 / (96 + 384))
    t5 = {"family": "t5", "layers": 6, "decoder_layers": 4, "hidden": 96, "heads": 6, "norm": "none"}
    encoder, decoder = 0.67 * 6**-0.25, (9 * 4) ** -0.25
    for tower, factor, attentions in (
        ("encoder", encoder, ["attention"]),
        ("decoder", decoder, ["attention", "cross"]),
    ):
        block = f"model.{tower}.blocks.2"
        for layer, shape in (("up", (384, 96)), ("down", (96, 384))):
            assert deviation(f"{block}.mlp.{layer}.weight", shape, **t5) == pytest.approx(glorot * factor)
        for attention in attentions:
            square = math.sqrt(1 / 96)
            for layer, by in (("q", 1), ("k", 1), ("v", factor), ("o", factor)):
                name = f"{block}.{attention}.{layer}.weight"
                assert deviation(name, (96, 96), **t5) == pytest.approx(square * by)
    assert deviation("model.embed.tokens.weight", (500, 96), **t5) == pytest.approx(96**-0.5 * decoder)
    gpt = {"layers": 5, "hidden": 96, "heads": 6, "norm": "none"}
    assert deviation("model.blocks.0.mlp.down", (8, 96, 384), **gpt) == pytest.approx(glorot * 45**-0.25)
    bert = {**gpt, "family": "bert"}
    assert deviation("model.blocks.0.mlp.up.weight", (384, 96), **bert) == pytest.approx(
        glorot * 0.67 * 5**-0.25
    )


def test_gpt2_counts_projections_into_the_stream():
    t5 = config.Model(family="t5", layers=6, decoder_layers=4, positions="relative")
    into = {"model.encoder.blocks.0.mlp.down": 12, "model.decoder.blocks.0.cross.o.weight": 12}
    into |= {
        "model.decoder.blocks.0.mlp.shared.down.weight": 12,
        "model.encoder.blocks.0.attention.o.weight": 12,
    }
    for name, sublayers in into.items():
        assert rule(name, (8, 8), t5) == Fill("normal", 0.02 / math.sqrt(sublayers))
    assert rule("model.blocks.0.mlp.down", (4, 8, 8), config.Model(layers=8)) == Fill("normal", 0.02 / 4)
    assert rule("model.blocks.0.mlp.up", (4, 8, 8), config.Model(layers=8)) == Fill("normal", 0.02)


class Parts(nn.Module):
    """A module with a persistent buffer, another that is not, and a salt."""

    def __init__(self):
        super().__init__()
        self.register_buffer("balance_bias", torch.full((4,), 9.0))
        self.register_buffer("direction", torch.full((5,), 9.0))
        self.register_buffer("angles", torch.full((3,), 9.0), persistent=False)
        self.register_buffer("salt", torch.zeros((), dtype=torch.int64), persistent=False)


def test_persistent_buffers_are_filled_and_others_left_alone():
    parts = Parts()
    initialise(parts, config.Model(), 0)
    assert (parts.balance_bias == 0).all()
    assert abs(parts.direction.norm().item() - 1) < 1e-6
    assert (parts.angles == 9).all()
    assert parts.salt.item() != 0


FAMILIES = {
    "gpt": (
        {"experts": config.Experts(count=3, bias_rate=0.1), "layer_scale": 1e-3, "spectral": True},
        "causal",
    ),
    "bert": ({"segments": 2, "pooler": True, "embedding_size": 12, "embedding_norm": True}, "masked"),
    "mobile": (
        {
            "family": "bert",
            "norm_position": "post",
            "norm": "affine",
            "embedding_size": 12,
            "layer_scale": 0.1,
            "embedding_trigram": True,
            "bottleneck": config.Bottleneck(hidden=14, ffns=2),
        },
        "masked",
    ),
    "t5": ({"positions": "relative", "tied": False, "norm": "rmsnorm"}, "spans"),
    "vit": ({"norm": "none", "vision": config.Vision(patch=4)}, "mae"),
}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_scheme_fills_every_tensor_of_every_family_by_slices(family, scheme):
    settings, name = FAMILIES[family]
    job = config.Job(
        model=config.Model(
            **{"family": family, **settings}, layers=2, hidden=24, heads=2, init=config.Init(scheme=scheme)
        ),
        objective=config.Objective(name=name, mae=config.Reconstruct(layers=1, hidden=20, heads=2)),
        data=config.Data(images=config.Images(size=16)),
    )
    inputs = Inputs(vocab=50, length=17, target_length=9, image=16, channels=3)
    meta = build_objective(job, inputs, device="meta")
    built = meta.to_empty(device="cpu")
    for tensor in (*built.parameters(), *built.buffers()):
        tensor.detach().fill_(-77)
    for rank in range(2):

        def rows(_, tensor, rank=rank):
            n = tensor.shape[0]
            a, b = rank * n // 2, (rank + 1) * n // 2
            return Slice(tensor[a:b], tuple(tensor.shape), (a, *[0] * (tensor.dim() - 1)))

        initialise(built, job.model, job.train.seed, rows)
    expected = build_objective(job, inputs).state_dict()
    for tensor_name, tensor in built.state_dict().items():
        assert torch.equal(tensor, expected[tensor_name]), tensor_name
        assert not (tensor == -77).any(), tensor_name
