"""ALiBi in whole models: against transformers' BLOOM, packed, and bidirectional."""

import pytest
import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Slopes, geometric
from headway.pretrain.config import Job
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.transformer import Context
from headway.pretrain.objectives import build_objective

VOCAB, LENGTH, HEADS, WIDTH = 61, 29, 6, 42
"""Six heads: slopes of no power of two."""


def ours(family="gpt", **model):
    shape = {"family": family, "layers": 2, "hidden": WIDTH, "heads": HEADS, "positions": "alibi", **model}
    name = "causal" if family == "gpt" else "masked"
    job = Job.model_validate({"model": shape, "objective": {"name": name}, "precision": "fp64"})
    made = build_objective(job, Inputs(VOCAB, LENGTH)).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.1)
    return made


def test_logits_and_gradients_are_blooms():
    from transformers import BloomConfig, BloomForCausalLM

    shape = {"vocab_size": VOCAB, "hidden_size": WIDTH, "n_layer": 2, "n_head": HEADS, "hidden_dropout": 0.0}
    theirs = BloomForCausalLM(BloomConfig(**shape, bos_token_id=0, eos_token_id=0)).double()
    made = ours(embedding_norm=True)
    names = {"embed.tokens": "word_embeddings", "embed.norm": "word_embeddings_layernorm", "norm": "ln_f"}
    block = {"attention_norm": "input_layernorm", "attention.o": "self_attention.dense",
             "mlp_norm": "post_attention_layernorm", "mlp.up": "mlp.dense_h_to_4h",
             "mlp.down": "mlp.dense_4h_to_h"}  # fmt: skip
    for i in range(2):
        names |= {f"blocks.{i}.{a}": f"h.{i}.{b}" for a, b in block.items()}
    weights, copied = dict(made.named_parameters()), {}
    for a, b in names.items():
        for kind in ("weight", "bias"):
            if f"model.{a}.{kind}" in weights:
                copied[f"transformer.{b}.{kind}"] = weights[f"model.{a}.{kind}"]
    for i in range(2):
        for kind in ("weight", "bias"):
            three = [weights[f"model.blocks.{i}.attention.{x}.{kind}"] for x in "qkv"]
            by_heads = torch.stack([x.unflatten(0, (HEADS, -1)) for x in three], 1).flatten(0, 2)
            copied[f"transformer.h.{i}.self_attention.query_key_value.{kind}"] = by_heads
    copied["lm_head.weight"] = copied["transformer.word_embeddings.weight"]
    assert copied.keys() == theirs.state_dict().keys()
    tokens = torch.randint(0, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = torch.func.functional_call(theirs, copied, (tokens,), {"use_cache": False}).logits
    found = made.logits(tokens)
    # fp64; BLOOM's slopes are fp32 powers of an fp32 base, off by 1e-6 of biases up to 15
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    upstream = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    slopes = [torch.autograd.grad(y, list(weights.values()), upstream) for y in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-4, atol=1e-4)


def test_isolated_documents_are_separate_sequences():
    made = ours()
    tokens = torch.randint(0, VOCAB, (1, LENGTH))
    packed = made.model(tokens, torch.tensor([[0] * 9 + [1] * (LENGTH - 9)])).final
    apart = torch.cat([made.model(tokens[:, :9]).final, made.model(tokens[:, 9:]).final], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-11, atol=1e-11)


def test_an_encoder_looks_to_both_sides_alike():
    made = ours("bert")
    attention = made.model.blocks[0].attention
    x = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64)
    place = torch.arange(LENGTH)
    slopes = torch.tensor(geometric(HEADS), dtype=torch.float64)
    bias = -slopes[:, None, None] * (place[:, None] - place).abs()
    y, _ = attention(x, Mask(False), bias_HSM=Slopes(slopes, place, place))
    torch.testing.assert_close(y, attention(x, Mask(False), bias_HSM=bias)[0], rtol=1e-11, atol=1e-11)
    seen = made.attention_maps({"tokens": torch.randint(0, VOCAB, (1, LENGTH))})
    assert seen.shape == (2, 1, HEADS, LENGTH, LENGTH)
    steep, flat = (seen[0, 0, h].double() for h in (0, HEADS - 1))
    far = (place[:, None] - place).abs()
    assert (steep * far).sum() < (flat * far).sum()  # the first head has the largest slope


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_compiled_blocks_take_slopes(dropout):
    torch.compiler.reset()
    made = ours(attention={"dropout": dropout})
    block = made.model.blocks[0]
    x, place = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64), torch.arange(LENGTH)
    noise = Noise.at(0, 3, torch.tensor([5, 9])).over(place) if dropout else None
    bias = Slopes(torch.tensor(geometric(HEADS), dtype=torch.float64), place, place)
    context = Context(Mask(), noise=noise, bias_HSS=bias)
    found, _ = torch.compile(block, fullgraph=True, backend="aot_eager")(x, context)
    torch.testing.assert_close(found, block(x, context)[0], rtol=1e-11, atol=1e-11)
