"""Small models of transformers with odd shapes and arbitrary weights, and how both houses compute with them."""

import torch
from torch import nn

VOCAB, LENGTH = 101, 23  # odd on purpose
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ROTARY = {
    "hidden_size": 42, "intermediate_size": 50, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 10, "vocab_size": VOCAB, "max_position_embeddings": LENGTH,
    "attn_implementation": "eager",
}  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_layer": 3, "n_embd": 42, "n_head": 6, "n_positions": LENGTH, "vocab_size": VOCAB}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**shape, **off, attn_implementation="eager"))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**ROTARY, rms_norm_eps=1e-5))


def llama_tied():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": 5e5}
    more = {"attention_bias": True, "mlp_bias": True, "rope_parameters": rope, "tie_word_embeddings": True}
    return LlamaForCausalLM(LlamaConfig(**ROTARY, **more))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**ROTARY, tie_word_embeddings=True))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**ROTARY, num_local_experts=5, num_experts_per_tok=2))


CAUSAL = {f.__name__: f for f in (gpt2, llama, llama_tied, qwen3)}


def disturbed(model: nn.Module) -> nn.Module:
    """Weights of every kind away from 0 and 1, where a swap would not show."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model.eval()
