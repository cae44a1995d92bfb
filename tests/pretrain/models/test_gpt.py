"""GPT against Hugging Face models with the same weights, and against itself in other arrangements."""

import pytest
import torch

from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.maps import attention_maps
from headway.pretrain.objectives import build_objective

VOCAB, LENGTH = 101, 23  # odd on purpose


def job(**model):
    return config.Job(model=config.Model(**model), data=config.Data(seq_len=LENGTH))


def objective(**model):
    built = build_objective(job(**model), Inputs(VOCAB, LENGTH))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a swap
        for p in built.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return built


def from_gpt2(theirs, layers):
    """Our name -> their tensor, in our layout; works on weights and on gradients."""
    names = {
        "model.embed.tokens.weight": theirs["transformer.wte.weight"],
        "model.embed.positions.weight": theirs["transformer.wpe.weight"],
    }
    for kind in ("weight", "bias"):
        names[f"model.norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for i in range(layers):
            a, b = f"model.blocks.{i}.", f"transformer.h.{i}."
            for p, part in zip("qkv", theirs[f"{b}attn.c_attn.{kind}"].chunk(3, -1), strict=True):
                names[f"{a}attention.{p}.{kind}"] = part.mT if part.dim() > 1 else part
            for our, their in (
                ("attention.o", "attn.c_proj"),
                ("mlp.up", "mlp.c_fc"),
                ("mlp.down", "mlp.c_proj"),
            ):
                tensor = theirs[f"{b}{their}.{kind}"]
                names[f"{a}{our}.{kind}"] = tensor.mT if tensor.dim() > 1 else tensor
            names[f"{a}attention_norm.{kind}"] = theirs[f"{b}ln_1.{kind}"]
            names[f"{a}mlp_norm.{kind}"] = theirs[f"{b}ln_2.{kind}"]
    return names


LLAMA = {
    "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj", "attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm",
}  # fmt: skip


def from_llama(theirs, layers):
    names = {
        "model.embed.tokens.weight": theirs["model.embed_tokens.weight"],
        "model.norm.weight": theirs["model.norm.weight"],
    }
    if "lm_head.weight" in theirs:
        names["head.weight"] = theirs["lm_head.weight"]
    for i in range(layers):
        for our, their in LLAMA.items():
            if (name := f"model.layers.{i}.{their}.weight") in theirs:
                names[f"model.blocks.{i}.{our}.weight"] = theirs[name]
    return names


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 3, "n_embd": 42, "n_head": 6, "n_positions": LENGTH, "vocab_size": VOCAB}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **off)), {"layers": 3, "hidden": 42, "heads": 6}, from_gpt2


LLAMA_STYLE = {
    "layers": 2, "hidden": 36, "heads": 6, "kv_heads": 2, "ffn": 50, "activation": "swiglu", "norm": "rmsnorm",
    "norm_eps": 1e-6, "positions": "rotary", "rotary_base": 5000.0, "bias": False,
}  # fmt: skip
LLAMA_SHAPE = {
    "num_hidden_layers": 2, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 50, "rms_norm_eps": 1e-6, "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}  # fmt: skip


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    built = LlamaForCausalLM(LlamaConfig(**LLAMA_SHAPE, tie_word_embeddings=False))
    return built, LLAMA_STYLE | {"tied": False}, from_llama


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    built = Qwen3ForCausalLM(Qwen3Config(**LLAMA_SHAPE, head_dim=10, tie_word_embeddings=True))
    style = {"tied": True, "head_dim": 10, "attention": config.Attention(qk_norm=True)}
    return built, LLAMA_STYLE | style, from_llama


@pytest.mark.parametrize("family", [gpt2, llama, qwen3])
def test_logits_loss_and_gradients_are_transformers(family):
    theirs, model, rename = family()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for p in theirs.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    ours = build_objective(job(**model), Inputs(VOCAB, LENGTH))
    weights = rename(dict(theirs.named_parameters()), model["layers"])
    assert weights.keys() == dict(ours.named_parameters()).keys()
    ours.load_state_dict({n: w.detach() for n, w in weights.items()})
    tokens = torch.randint(0, VOCAB, (3, LENGTH + 1), generator=generator)
    batch = ours.collate({"tokens": tokens.numpy()})
    out = theirs(input_ids=batch["tokens"], labels=batch["labels"], shift_labels=batch["labels"])
    # fp32 with logits of order 1: 1e-5 is some 100 roundings.
    torch.testing.assert_close(ours.logits(batch["tokens"]), out.logits, rtol=1e-5, atol=1e-5)
    result = ours(batch)
    loss = result.terms["tokens"] / ours.counts(batch)["tokens"]
    torch.testing.assert_close(loss, out.loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    out.loss.backward()
    expected = rename({n: p.grad for n, p in theirs.named_parameters()}, model["layers"])
    for name, p in ours.named_parameters():
        torch.testing.assert_close(
            p.grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_isolated_documents_are_separate_sequences():
    ours = objective(layers=2, hidden=24, heads=4, positions="rotary")
    tokens = torch.randint(0, VOCAB, (1, LENGTH))
    documents = torch.tensor([[0] * 9 + [1] * (LENGTH - 9)])
    packed = ours.model(tokens, documents).final
    # Rotary positions are relative: the second document may as well begin at position 0.
    apart = torch.cat([ours.model(tokens[:, :9]).final, ours.model(tokens[:, 9:]).final], 1)
    torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-5)


def test_positions_can_be_given():
    ours = objective(layers=1, hidden=24, heads=4)
    tokens = torch.randint(0, VOCAB, (2, 7))
    moved = ours.model(tokens, columns=Columns(torch.arange(7) + 5)).final
    assert not torch.allclose(moved, ours.model(tokens).final)
    given = ours.model(tokens, columns=Columns(torch.arange(7))).final
    assert torch.equal(given, ours.model(tokens).final)


def test_a_sequence_beyond_the_position_table_is_refused():
    ours = objective(layers=1, hidden=24, heads=4, max_positions=LENGTH)
    with pytest.raises(JobError, match=r"data.seq_len = 24: must not exceed the 23 rows"):
        ours.model(torch.zeros(1, LENGTH + 1, dtype=torch.int64))


def test_a_kernel_that_cannot_is_refused():
    attention = config.Attention(kernel="sdpa", dropout=0.1)
    with pytest.raises(JobError, match=r"model.attention.kernel = 'sdpa': .*Nearest legal choice: blocks"):
        objective(layers=1, hidden=24, heads=4, attention=attention)


def test_attention_maps_are_transformers():
    theirs, model, rename = gpt2()
    ours = build_objective(job(**model), Inputs(VOCAB, LENGTH))
    ours.load_state_dict(rename(dict(theirs.named_parameters()), model["layers"]))
    theirs.set_attn_implementation("eager")
    tokens = torch.randint(0, VOCAB, (2, LENGTH))
    with torch.no_grad():
        expected = torch.stack(theirs(tokens, output_attentions=True).attentions)
    for block in ours.model.blocks:
        block.compile()
    maps = attention_maps(ours.model, tokens)
    assert maps.shape == (3, 2, 6, LENGTH, LENGTH)
    torch.testing.assert_close(maps, expected, rtol=1e-5, atol=1e-6)


def test_post_norm_is_the_original_transformer():
    ours = objective(layers=1, hidden=24, heads=4, norm_position="post", positions="none", activation="relu")
    theirs = torch.nn.TransformerEncoderLayer(24, 4, 96, dropout=0.0, batch_first=True, norm_first=False)
    block, tokens = ours.model.blocks[0], torch.randint(0, VOCAB, (2, LENGTH))
    with torch.no_grad():
        for kind in ("weight", "bias"):
            part = [getattr(getattr(block.attention, p), kind) for p in "qkv"]
            getattr(theirs.self_attn, f"in_proj_{kind}").copy_(torch.cat(part))
            pairs = [(theirs.self_attn.out_proj, block.attention.o), (theirs.linear1, block.mlp.up),
                     (theirs.linear2, block.mlp.down), (theirs.norm1, block.attention_norm),
                     (theirs.norm2, block.mlp_norm)]  # fmt: skip
            for a, b in pairs:
                getattr(a, kind).copy_(getattr(b, kind))
    causal = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH)
    expected = theirs(ours.model.embed.tokens(tokens), src_mask=causal, is_causal=True)
    torch.testing.assert_close(ours.model(tokens).final, expected, rtol=1e-5, atol=1e-5)
