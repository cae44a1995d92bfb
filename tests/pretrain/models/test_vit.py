"""ViT and DeiT against timm: tokens, positions, layer scale, pooling, and what stochastic depth leaves out."""

import pytest
import torch

from headway.kernels import random
from headway.pretrain.config import Job
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise, StochasticDepth
from headway.pretrain.objectives import build_objective
from headway.tests import oracles

DEPTH, WIDTH = 4, 24


def ours(class_token=True, pool="first", distill_token=False, **model):
    """An objective in fp64 whose biases and gains are not those of the start."""
    shape = {"family": "vit", "layers": DEPTH, "hidden": WIDTH, "heads": 3, "activation": "gelu", "norm_eps": 1e-6,
             "vision": {"patch": 2, "class_token": class_token, "distill_token": distill_token}, **model}  # fmt: skip
    tree = {"model": shape, "data": {"images": {"size": 8}}, "precision": "fp64"}
    job = Job.model_validate(tree | {"objective": {"name": "classify", "pool": pool}})
    made = build_objective(job, Inputs(length=job.row_tokens, image=8, channels=3, classes=5))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return made


@torch.no_grad()
def timms(made, **settings):
    """timm's model with the same weights."""
    oracles.timm()
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer

    weights, found = made.state_dict(), {}
    kind = VisionTransformer if made.head_distill is None else VisionTransformerDistilled
    theirs = kind(
        img_size=8, patch_size=2, num_classes=5, embed_dim=WIDTH, depth=DEPTH, num_heads=3, fc_norm=False, **settings
    ).double()  # fmt: skip
    pairs = {"norm1": "attention_norm", "norm2": "mlp_norm", "attn.proj": "attention.o", "mlp.fc1": "mlp.up",
             "mlp.fc2": "mlp.down"}  # fmt: skip
    for i in range(DEPTH):
        block = f"model.blocks.{i}."
        for kind in ("weight", "bias"):
            found |= {f"blocks.{i}.{a}.{kind}": weights[f"{block}{b}.{kind}"] for a, b in pairs.items()}
            found[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(
                [weights[f"{block}attention.{x}.{kind}"] for x in "qkv"]
            )
        for a, b in (("ls1.gamma", "attention_scale"), ("ls2.gamma", "mlp_scale")):
            if block + b in weights:
                found[f"blocks.{i}.{a}"] = weights[block + b]
    for kind in ("weight", "bias"):
        found |= {f"norm.{kind}": weights[f"model.norm.{kind}"], f"head.{kind}": weights[f"head.{kind}"]}
    found["patch_embed.proj.weight"] = weights["model.embed.patches.weight"].view(WIDTH, 3, 2, 2)
    found["patch_embed.proj.bias"] = weights["model.embed.patches.bias"]
    found["pos_embed"] = weights["model.embed.positions.weight"][None]
    if "model.embed.class_token" in weights:
        found["cls_token"] = weights["model.embed.class_token"][None]
    if made.head_distill is not None:
        found["dist_token"] = weights["model.embed.distill_token"][None]
        found |= {f"head_dist.{kind}": weights[f"head_distill.{kind}"] for kind in ("weight", "bias")}
    theirs.load_state_dict(found, strict=True)
    return theirs


def pictures(rows=3):
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


CASES = [
    ({}, {}),
    ({"layer_scale": 0.1}, {"init_values": 0.1}),
    ({"pool": "mean"}, {"global_pool": "avg"}),
    ({"pool": "mean", "class_token": False}, {"global_pool": "avg", "class_token": False}),
    ({"distill_token": True}, {}),
]


@pytest.mark.parametrize(("mine", "settings"), CASES)
def test_logits_and_gradients_are_timms(mine, settings):
    made = ours(**mine)
    theirs = timms(made, **settings)
    x = [pictures().requires_grad_() for _ in range(2)]
    found, expected = made.logits(x[0]), theirs(x[1])
    # fp64, four layers of sums of 96 products: 1e-14 each
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad, rtol=1e-9, atol=1e-10)


def test_two_heads_train_apart_as_timms_do():
    """What timm gives in distilled training: logits of both heads."""
    made = ours(distill_token=True)
    theirs = timms(made)
    theirs.set_distilled_training()
    final = made.model(pictures(), outputs=2).final
    assert final.shape == (3, 2, WIDTH)
    found = made.head(final[:, 0]), made.head_distill(final[:, 1])
    torch.testing.assert_close(found, theirs.train()(pictures()), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("distill_token", [False, True])
def test_some_patches_are_those_of_all(distill_token):
    """What MAE's encoder reads: patches with the positions that they have in the whole image."""
    made = ours(layers=1, distill_token=distill_token).model
    visible = torch.tensor([[0, 3, 9], [1, 2, 15], [5, 6, 7]])
    every, some = made.embed(pictures(), None), made.embed(pictures(), None, visible)
    for row in range(3):
        places = torch.cat([torch.arange(made.embed.first), visible[row] + made.embed.first])
        assert torch.equal(some[row], every[row, places])


def test_stochastic_depth_is_timms():
    """Rates by depth, sub-layers left out for whole samples, and the factor of those that stay."""
    rate, slots = 0.6, torch.arange(40)
    made = ours(stochastic_depth=rate)
    theirs = timms(made, drop_path_rate=rate).train()
    noise = Noise.at(seed=3, step=5, slots_B=slots)
    for ours_, block in zip(made.model.blocks, theirs.blocks, strict=True):
        if ours_.depth is None:
            assert isinstance(block.drop_path1, torch.nn.Identity)
            continue
        for name, path in (("attention", block.drop_path1), ("mlp", block.drop_path2)):
            depth = ours_.depth[name]
            assert depth.p == pytest.approx(path.drop_prob, rel=1e-6)  # timm's rates are fp32
            kept = random.uniform(noise.key ^ depth.salt, slots) >= depth.p
            path.forward = lambda x, kept=kept, p=depth.p: x * kept[:, None, None] / (1 - p)
    x = pictures(len(slots))
    found = made.model(x, None, noise).final
    torch.testing.assert_close(found, theirs.forward_features(x), rtol=1e-10, atol=1e-11)
    part = made.model(x[7:9], None, noise._replace(slots_B=slots[7:9])).final
    torch.testing.assert_close(part, found[7:9], rtol=1e-11, atol=1e-12)


def test_samples_are_left_out_as_often_as_asked_and_the_mean_stays():
    depth = StochasticDepth(0.3)
    count = 20_000
    out = depth(torch.ones(count, 2, 3), Noise.at(0, 0, torch.arange(count)))
    assert (out == out[:, :1, :1]).all()  # a whole sample at a time
    dropped = (out[:, 0, 0] == 0).double().mean()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / count) ** 0.5
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 1 / 0.7]))
    x = torch.ones(2, 2, 3)
    assert depth(x, None) is x


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_last_block_computes_what_is_read(tokens):
    """The tokens before the patches alone give the loss, dropout and gradients of all tokens."""
    made = ours(distill_token=tokens == 2, dropout=0.2, stochastic_depth=0.3, attention={"dropout": 0.2})
    assert made.outputs == tokens
    noise = Noise.at(seed=3, step=5, slots_B=torch.arange(3))
    batch = {"pixels": pictures(), "labels": torch.tensor([0, 3, 4])}
    found = {}
    for outputs in (tokens, None):
        made.outputs = outputs
        made.zero_grad()
        total = made(batch, noise).terms["rows"]
        total.backward()
        found[outputs] = [total, *(p.grad for p in made.parameters())]
    # fp64, sums of at most 96 products in another order
    for some, every in zip(found[tokens], found[None], strict=True):
        torch.testing.assert_close(some, every, rtol=1e-10, atol=1e-11)


def test_all_places_are_computed_where_the_loss_is_about_all():
    assert ours(pool="mean").outputs is None
    assert ours(attention={"entropy_penalty": 0.1}).outputs is None
    assert ours(experts={"count": 2, "top_k": 2}).outputs is None
    assert ours(experts={"count": 2, "top_k": 2, "pattern": "ED"}).outputs == 1
