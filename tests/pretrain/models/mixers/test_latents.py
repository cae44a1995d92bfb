"""Induced points against PyTorch Geometric's, Perceiver against transformers', and Monarch against its matrix."""

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.mixers import monarch
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.init import initialise
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.mixers import build_mixer
from headway.pretrain.models.seat import Seat
from headway.tests import oracles

HIDDEN, HEADS, LATENTS, LENGTH = 24, 3, 5, 33
PADDED = torch.tensor([[0] * 20 + [-1] * 13, [0] * LENGTH])


def layer_of(word, norm="layernorm", **attention):
    made = config.Attention(mechanism=word, **attention)
    model = config.Model(hidden=HIDDEN, heads=HEADS, norm=norm, attention=made)
    layer = build_mixer(model, Seat(0, False, tokens=LENGTH)).double()
    initialise(layer, model.model_copy(update={"init": config.Init(scheme="normal", std=0.3)}), seed=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in layer.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.1)
    return layer


def inputs():
    x = torch.randn(2, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x.requires_grad_()


def to_geometric(ours, block):
    """Tensors of an attention of ours as one of `nn.MultiheadAttention`."""
    found = {}
    for kind in ("weight", "bias"):
        found[f"{block}.attn.in_proj_{kind}"] = torch.cat([ours[f"{x}.{kind}"] for x in "qkv"])
        found[f"{block}.attn.out_proj.{kind}"] = ours[f"o.{kind}"]
    return found


def geometrics(layer, layer_norm):
    """An induced block with our points, our first MAB, and the attention of our second one."""
    module = oracles.file("torch_geometric/nn/aggr/utils.py")
    theirs = module.InducedSetAttentionBlock(HIDDEN, LATENTS, HEADS, layer_norm).double()
    names = {"ind": layer.induced[None]}
    names |= to_geometric(dict(layer.read.named_parameters()), "mab1")
    names |= to_geometric(dict(layer.write.named_parameters()), "mab2")
    for kind in ("weight", "bias"):
        names[f"mab1.lin.{kind}"] = getattr(layer.rff, kind)
        if layer_norm:
            names[f"mab1.layer_norm1.{kind}"] = getattr(layer.read_norm, kind)
            names[f"mab1.layer_norm2.{kind}"] = getattr(layer.rff_norm, kind)
    return theirs, names


@pytest.mark.parametrize("mask", [Mask(False), Mask(False, PADDED)])
@pytest.mark.parametrize("norm", ["none", "layernorm"])
@pytest.mark.parametrize("kernel", ["auto", "reference", "blocks"])
def test_induced_is_geometrics(kernel, norm, mask):
    layer = layer_of("induced", norm, latents=LATENTS, kernel=kernel)
    theirs, names = geometrics(layer, norm == "layernorm")
    x, real = inputs(), torch.ones(2, LENGTH, dtype=torch.bool) if mask.documents is None else PADDED >= 0

    ours, _ = layer(x, mask)
    # A block adds the residual and its feed-forward layer: here theirs, so that all that it gives is compared.
    out = torch.where(real[..., None], ours, 0) + x
    if norm == "layernorm":
        out = theirs.mab2.layer_norm1(out)
    out = out + theirs.mab2.lin(out).relu()
    if norm == "layernorm":
        out = theirs.mab2.layer_norm2(out)
    expected = torch.func.functional_call(theirs, names, (x, real))
    torch.testing.assert_close(
        out, expected, rtol=1e-10, atol=1e-10
    )  # fp64, chains of sums of up to 33 terms
    given = [x, *layer.parameters()]
    slopes = [torch.autograd.grad(y.square().sum(), given) for y in (out, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


def perceivers(depth):
    from transformers import PerceiverConfig
    from transformers.models.perceiver import modeling_perceiver as theirs

    shape = PerceiverConfig(
        d_latents=HIDDEN, d_model=HIDDEN, num_latents=LATENTS, num_blocks=1, num_self_attends_per_block=depth,
        num_self_attention_heads=HEADS, num_cross_attention_heads=HEADS, self_attention_widening_factor=4,
        cross_attention_widening_factor=4, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    encoder = theirs.PerceiverEncoder(shape, kv_dim=HIDDEN).double()
    encoder.cross_attention.attention.self.layernorm2 = (
        torch.nn.Identity()
    )  # the tokens that a block gives are normed
    query = theirs.PerceiverAttention(
        shape, is_cross_attention=True, num_heads=HEADS, q_dim=HIDDEN, kv_dim=HIDDEN, use_query_residual=False
    ).double()
    query.self.layernorm1 = torch.nn.Identity()
    return encoder, query


def to_perceiver(layer):
    """(names of the encoder, names of the attention that reads it) -> our tensors."""
    parts = {"query": "q", "key": "k", "value": "v"}

    def attention(ours, at):
        found = {
            f"{at}self.{t}.{x}": getattr(getattr(ours, o), x)
            for t, o in parts.items()
            for x in ("weight", "bias")
        }
        return found | {f"{at}output.dense.{x}": getattr(ours.o, x) for x in ("weight", "bias")}

    encoder, reader = {}, attention(layer.write, "")
    for x in ("weight", "bias"):
        reader[f"self.layernorm2.{x}"] = getattr(layer.norm, x)
    for i, one in enumerate(layer.layers):
        at = "cross_attention." if i == 0 else f"self_attends.{i - 1}."
        encoder |= attention(one.attention, f"{at}attention.")
        for x in ("weight", "bias"):
            encoder[f"{at}attention.self.layernorm1.{x}"] = getattr(one.attention_norm, x)
            encoder[f"{at}layernorm.{x}"] = getattr(one.mlp_norm, x)
            encoder[f"{at}mlp.dense1.{x}"] = getattr(one.mlp.up, x)
            encoder[f"{at}mlp.dense2.{x}"] = getattr(one.mlp.down, x)
    return encoder, reader


@pytest.mark.parametrize("mask", [Mask(False), Mask(False, PADDED)])
@pytest.mark.parametrize("depth", [1, 3])
def test_perceiver_is_transformers(depth, mask):
    layer = layer_of("perceiver", latents=LATENTS, depth=depth)
    (encoder, query), (encodes, reads) = perceivers(depth), to_perceiver(layer)
    x, hidden = inputs(), None
    if mask.documents is not None:
        hidden = torch.zeros(2, 1, 1, LENGTH, dtype=x.dtype).masked_fill((PADDED < 0)[:, None, None], -1e30)
    ours, _ = layer(x, mask)
    latents = layer.latents.expand(2, -1, -1)
    named = {"inputs": x, "inputs_mask": hidden}
    z = torch.func.functional_call(encoder, encodes, (latents,), named, strict=True).last_hidden_state
    expected = torch.func.functional_call(query, reads, (x,), {"inputs": z}, strict=True)[0]
    torch.testing.assert_close(
        ours, expected, rtol=1e-10, atol=1e-10
    )  # fp64, chains of sums of up to 96 terms
    given = [x, *layer.parameters()]
    slopes = [torch.autograd.grad(y.square().sum(), given) for y in (ours, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-9)


def test_monarch_is_gates_and_a_matrix():
    layer, x = layer_of("monarch"), inputs()
    assert layer.left.shape == (HEADS, 6, 6, 6)
    matrix = monarch.matrix(layer.left, layer.right)[:, :LENGTH, :LENGTH]
    gated = (layer.k(x) * layer.v(x)).unflatten(-1, (HEADS, -1))
    mixed = torch.einsum("hst,bthd->bshd", matrix, gated).flatten(2)
    torch.testing.assert_close(layer(x, Mask(False))[0], layer.o(layer.q(x) * mixed))


def test_monarch_knows_how_long_rows_are():
    layer = layer_of("monarch")
    with pytest.raises(JobError, match=r"data.seq_len = 37.*36 places"):
        layer(torch.randn(1, 37, HIDDEN, dtype=torch.float64), Mask(False))


@pytest.mark.parametrize("word", ["monarch", "induced", "perceiver"])
def test_the_first_places_alone(word):
    layer, x = layer_of(word), inputs()
    for mask in (Mask(False), Mask(False, PADDED)):
        torch.testing.assert_close(layer(x, mask, queries=4)[0], layer(x, mask)[0][:, :4])


@pytest.mark.parametrize("word", ["induced", "perceiver"])
def test_order_and_rows_of_nothing_but_padding(word):
    layer, x = layer_of(word), inputs()
    order = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x[:, order], Mask(False))[0], layer(x, Mask(False))[0][:, order])
    blank = torch.full((2, LENGTH), -1)
    y, _ = layer(x, Mask(False, blank))
    assert y.isfinite().all()
    assert (
        torch.autograd.grad(y.sum(), layer.read.k.weight if word == "induced" else layer.latents)[0]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("word", ["induced", "perceiver"])
def test_dropout_of_latents_does_not_depend_on_what_tokens_are_here(word):
    noise = Noise.at(1, 2, torch.tensor([4, 6]))
    found = []
    for kernel in ("reference", "blocks"):
        layer = layer_of(word, dropout=0.2, kernel=kernel, latents=40)  # more points than tokens
        found.append(layer(inputs(), Mask(False), None, noise.over(torch.arange(LENGTH)))[0])
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(found[0], layer(inputs(), Mask(False))[0])


def test_latents_begin_as_tables_and_points_as_tokens():
    model = config.Model(hidden=HIDDEN, heads=HEADS, init=config.Init(std=0.02))
    points, latents = layer_of("induced"), layer_of("perceiver")
    for layer in (points, latents):
        initialise(layer, model, seed=1)
    assert 0.8 < points.induced.std() < 1.2
    assert 0.015 < latents.latents.std() < 0.025
