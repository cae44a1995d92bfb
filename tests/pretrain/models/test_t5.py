"""Encoder-decoders: packed and padded rows, and the Transformer of 2017 against torch's own."""

import math

import pytest
import torch
from torch import nn

from headway.pretrain.config import Job
from headway.pretrain.models.init import initialise
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.t5 import T5

VOCAB = 41


def made(**model):
    """A model in fp64 whose biases and gains are not those of the start."""
    shape = {"family": "t5", "layers": 2, "decoder_layers": 3, "hidden": 24, "heads": 3, **model}
    job = Job.model_validate({"model": shape, "objective": {"name": "pairs"}})
    ours = T5(job.model, Inputs(VOCAB, 12, 10)).double()
    initialise(ours, job.model, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in ours.parameters():
            p += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return ours


def draw(rows, length, seed=0):
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


T5_SHAPE = {
    "positions": "relative",
    "relative_buckets": 8,
    "relative_distance": 12,
    "norm": "rmsnorm",
    "bias": False,
}


@pytest.mark.parametrize("shape", [T5_SHAPE, {"positions": "none", "norm_position": "post"}])
def test_packed_documents_are_separate_pairs(shape):
    """Bidirectional, causal and cross-attention each keep to a document; padding is one of its own."""
    ours = made(**shape)
    sources, targets = draw(1, 12), draw(1, 10, 1)
    documents = torch.tensor([[0] * 5 + [1] * 4 + [-1] * 3])
    target_documents = torch.tensor([[0] * 3 + [1] * 6 + [-1]])
    packed = ours(sources, targets, documents, target_documents).final
    for source, target in ((slice(0, 5), slice(0, 3)), (slice(5, 9), slice(3, 9))):
        alone = ours(sources[:, source], targets[:, target]).final
        # fp64: the same sums, with zeros among them
        torch.testing.assert_close(packed[:, target], alone, rtol=1e-11, atol=1e-12)
    assert packed.isfinite().all()


def test_padded_sources_are_not_seen():
    ours = made(**T5_SHAPE)
    sources, targets = draw(3, 12), draw(3, 10, 1)
    lengths = torch.tensor([12, 7, 1])
    documents = (torch.arange(12) < lengths[:, None]).int() - 1
    padded = ours(sources, targets, documents).final
    for i, length in enumerate(lengths.tolist()):
        alone = ours(sources[i : i + 1, :length], targets[i : i + 1]).final
        torch.testing.assert_close(padded[i : i + 1], alone, rtol=1e-11, atol=1e-12)


def torchs(ours: T5) -> nn.Transformer:
    """torch's Transformer with our weights. Its stacks have norms after the last layer, which the paper's do not."""
    kind = {"dim_feedforward": 96, "dropout": 0.0, "batch_first": True, "dtype": torch.float64}
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 3, **kind), 2, norm=None, enable_nested_tensor=False
    )
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(24, 3, **kind), 3, norm=None)
    theirs = nn.Transformer(24, 3, custom_encoder=encoder, custom_decoder=decoder, **kind)
    for stack, blocks in ((encoder, ours.encoder.blocks), (decoder, ours.decoder.blocks)):
        for layer, block in zip(stack.layers, blocks, strict=True):
            copy_layer(layer, block)
    return theirs


@torch.no_grad()
def copy_layer(layer, block):
    kinds = [(layer.self_attn, block.attention)]
    pairs = [
        (layer.linear1, block.mlp.up),
        (layer.linear2, block.mlp.down),
        (layer.norm1, block.attention_norm),
    ]
    if hasattr(layer, "multihead_attn"):
        kinds.append((layer.multihead_attn, block.cross))
        pairs += [(layer.norm2, block.cross_norm), (layer.norm3, block.mlp_norm)]
    else:
        pairs.append((layer.norm2, block.mlp_norm))
    for theirs, ours in kinds:
        pairs.append((theirs.out_proj, ours.o))
        for kind in ("weight", "bias"):
            parts = [getattr(part, kind) for part in (ours.q, ours.k, ours.v)]
            getattr(theirs, f"in_proj_{kind}").copy_(torch.cat(parts))
    for theirs, ours in pairs:
        theirs.weight.copy_(ours.weight)
        theirs.bias.copy_(ours.bias)


def test_post_norm_relu_and_sines_are_the_transformer_of_2017():
    ours = made(positions="sinusoidal", norm_position="post", activation="relu", embedding_scale=True)
    theirs = torchs(ours)
    sources, targets, lengths = draw(3, 12), draw(3, 10, 1), torch.tensor([12, 7, 4])
    real = torch.arange(12) < lengths[:, None]

    def embedded(tokens):
        """Section 3.4: times sqrt(hidden); section 3.5: sines at even features, cosines at odd ones."""
        place, pair = torch.arange(tokens.shape[1]).double()[:, None], torch.arange(12).double()
        angle = place / 10000 ** (2 * pair / 24)
        waves = torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
        return ours.embed.tokens.weight[tokens] * math.sqrt(24) + waves

    causal = nn.Transformer.generate_square_subsequent_mask(10, dtype=torch.float64)
    blank = torch.zeros(3, 12, dtype=torch.float64).masked_fill(~real, -math.inf)
    expected = theirs(
        embedded(sources),
        embedded(targets),
        tgt_mask=causal,
        src_key_padding_mask=blank,
        memory_key_padding_mask=blank,
    )
    found = ours(sources, targets, real.int() - 1).final
    # fp64, five layers of sums of 96 products: 1e-14 each
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
    weights = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    table = ours.embed.tokens.weight
    gradients = [torch.autograd.grad((x * weights).sum(), table)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-10)
