"""Which parameters decay, which Muon moves, and how deep they lie."""

import pytest
import torch

from headway.pretrain.optim.groups import decays, is_hidden_matrix, rate_factors
from headway.tests import oracles

KINDS = {  # name: (shape, decays, Muon)
    "model.embed.tokens.weight": ((50, 8), True, False),
    "model.embed.positions.weight": ((16, 8), True, False),
    "model.embed.class_token": ((1, 8), False, False),
    "model.embed.distill_token": ((1, 8), False, False),
    "decoder.mask_token": ((1, 8), False, False),
    "model.embed.patches.weight": ((8, 12), True, False),
    "model.encoder.relative.table.weight": ((32, 2), True, False),
    "model.blocks.0.attention.q.weight": ((8, 8), True, True),
    "model.blocks.0.attention.q.bias": ((8,), False, False),
    "model.blocks.0.attention_norm.weight": ((8,), False, False),
    "model.blocks.0.attention_scale": ((8,), False, False),
    "model.blocks.1.mlp.router.weight": ((4, 8), True, False),
    "model.blocks.1.mlp.up": ((4, 32, 8), True, True),
    "model.blocks.1.mlp.up_bias": ((4, 32), False, False),
    "model.blocks.1.mlp.down_bias": ((4, 8), False, False),
    "model.norm.weight": ((8,), False, False),
    "head.weight": ((50, 8), True, False),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_parameters(name):
    shape, decaying, hidden = KINDS[name]
    parameter = torch.empty(shape)
    assert (decays(name, parameter), is_hidden_matrix(name, parameter)) == (decaying, hidden)


def depths(names):
    """Depths from the top: 0 has the full rate."""
    return {name: round(-torch.tensor(f).log2().item()) for name, f in rate_factors(names, 0.5).items()}


def test_depths_of_a_single_stack():
    assert depths(
        [
            "model.embed.tokens.weight",
            "model.embed.class_token",
            "model.embed.distill_token",
            "model.blocks.0.mlp.up.weight",
            "model.blocks.10.mlp.up.weight",
            "model.norm.weight",
            "pooler.weight",
            "head.weight",
            "head_distill.weight",
        ]
    ) == {
        "model.embed.tokens.weight": 12,
        "model.embed.class_token": 12,
        "model.embed.distill_token": 12,
        "model.blocks.0.mlp.up.weight": 11,
        "model.blocks.10.mlp.up.weight": 1,
        "model.norm.weight": 0,
        "pooler.weight": 0,
        "head.weight": 0,
        "head_distill.weight": 0,
    }


def test_a_decoder_lies_above_its_encoder():
    assert depths(
        [
            "model.embed.tokens.weight",
            "model.encoder.blocks.0.mlp.up.weight",
            "model.encoder.blocks.1.mlp.up.weight",
            "model.encoder.norm.weight",
            "model.decoder.positions.weight",
            "model.decoder.blocks.0.mlp.up.weight",
            "model.decoder.blocks.2.mlp.up.weight",
            "model.decoder.norm.weight",
            "head.weight",
        ]
    ) == {
        "model.embed.tokens.weight": 6,
        "model.encoder.blocks.0.mlp.up.weight": 5,
        "model.encoder.blocks.1.mlp.up.weight": 4,
        "model.encoder.norm.weight": 3,
        "model.decoder.positions.weight": 4,
        "model.decoder.blocks.0.mlp.up.weight": 3,
        "model.decoder.blocks.2.mlp.up.weight": 1,
        "model.decoder.norm.weight": 0,
        "head.weight": 0,
    }


def test_the_decoder_of_a_masked_autoencoder_lies_above_the_vit():
    found = depths(
        [
            "model.embed.patches.weight",
            "model.blocks.3.mlp.up.weight",
            "decoder.embed.weight",
            "decoder.mask_token",
            "decoder.blocks.0.mlp.up.weight",
            "decoder.blocks.1.mlp.up.weight",
        ]
    )
    assert list(found.values()) == [7, 3, 3, 3, 2, 1]


def test_factors_are_timms_for_a_vision_transformer():
    oracles.timm()
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import param_groups_layer_decay

    vit = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=5, num_heads=2, num_classes=3)
    names = {id(p): name for name, p in vit.named_parameters()}
    theirs = {
        names[id(p)]: group["lr_scale"]
        for group in param_groups_layer_decay(vit, 0.1, layer_decay=0.75)
        for p in group["params"]
    }
    parameters = {_ours(name): p for name, p in vit.named_parameters()}
    factors = rate_factors(parameters, 0.75)
    # timm moves the final norm with the last block; here, as in BEiT's and MAE's code, with the head.
    theirs |= {"norm.weight": 1.0, "norm.bias": 1.0}
    for name, scale in theirs.items():
        assert factors[_ours(name)] == pytest.approx(scale, rel=1e-15)
    assert len(set(factors.values())) == 7


def _ours(name):
    """Our names of what timm's ViT keeps outside of blocks."""
    stem = {"cls_token": "embed.class_token", "pos_embed": "embed.positions.weight"}
    return stem.get(name, name.replace("patch_embed.", "embed.patches."))
