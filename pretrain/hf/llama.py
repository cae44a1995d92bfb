"""Llama, Qwen3 and Mixtral in transformers' names: one table, with QK-norm (Qwen3) or experts (Mixtral).

Mixtral is read and written as its published checkpoints are, one matrix an expert (w1 gate, w2 down, w3 up);
transformers fuses them when it loads.
"""

from __future__ import annotations

from dataclasses import replace

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.family import Family, Settings, demand, is_tied
from headway.pretrain.hf.links import STACKED, Link, layers, link
from headway.pretrain.hf.rope import read_rope, write_rope
from headway.pretrain.models.inputs import Inputs

LONGEST = 4096
"""Tokens of a row after import, at most: rotary models say 131,072, which no first run wants."""

BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
}
DENSE = {"mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj", "mlp.down": "mlp.down_proj"}
EXPERTS = {"mlp.gate": "w1", "mlp.down": "w2", "mlp.up": "w3"}


def read(hf: dict, names: frozenset[str]) -> Settings:
    """Settings beyond the tables."""
    window = hf.get("sliding_window") if hf["model_type"] != "mixtral" else None
    if window and hf.get("use_sliding_window", True):
        rule = "Headway reads one window for all layers, of Mixtral"
        raise JobError("config.json: sliding_window", window, rule, None)
    if hf.get("attention_bias", False) != hf.get("mlp_bias", False):
        rule = "Headway's linear layers have biases everywhere or nowhere"
        raise JobError("config.json: attention_bias", hf.get("attention_bias"), rule, hf.get("mlp_bias"))
    return {
        "objective.name": "causal",
        "data.seq_len": min(hf["max_position_embeddings"], LONGEST),
        "model.activation": "swiglu",
        "model.dropout": 0.0,  # Llama has none; that of a model trained here is not written
        "model.kv_heads": hf.get("num_key_value_heads") or hf["num_attention_heads"],
        "model.head_dim": hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
        "model.bias": bool(hf.get("attention_bias", False)),
        "model.tied": is_tied(hf, names, "lm_head.weight"),
        **read_rope(hf),
    }


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the tables."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": inputs.vocab,
        "max_position_embeddings": job.data.seq_len,
        **write_rope(job),
        "hidden_act": "silu",
        "attention_bias": job.model.bias,
        "mlp_bias": job.model.bias,
    }


def write_qwen3(job: Job, inputs: Inputs) -> dict:
    """Qwen3's keys beyond the tables."""
    config = write(job, inputs) | {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": False}
    del config["mlp_bias"]
    return config


def read_mixtral(hf: dict, names: frozenset[str]) -> Settings:
    """Mixtral's settings beyond the tables."""
    word = "window" if hf.get("sliding_window") else "dense"
    return read(hf, names) | {"model.attention.mechanism": word}


def write_mixtral(job: Job, inputs: Inputs) -> dict:
    """Mixtral's keys beyond the tables."""
    if job.model.attention.mechanism == "dense":
        demand(job, "model.attention.window", None, "mixtral")
    else:
        demand(job, "model.attention.mechanism", "window", "mixtral")
    config = write(job, inputs) | {"architectures": ["MixtralForCausalLM"]}
    config["intermediate_size"] = job.model.experts.ffn or job.model.ffn_width
    del config["attention_bias"], config["mlp_bias"]
    return config


def links(job: Job) -> list[Link]:
    """Where the tensors are."""
    found = [
        link("model.embed.tokens.weight", "model.embed_tokens.weight"),
        link("model.norm.weight", "model.norm.weight"),
        link("head.weight", "lm_head.weight"),
    ]
    for i in range(job.model.layers):
        ours, theirs = f"model.blocks.{i}.", f"model.layers.{i}."
        found += layers(BLOCK, ours, theirs)
        if not job.model.has_experts(i):
            found += layers(DENSE, ours, theirs)
            continue
        theirs += "block_sparse_moe."
        found.append(link(f"{ours}mlp.router.weight", f"{theirs}gate.weight"))
        for name, matrix in EXPERTS.items():
            each = tuple(f"{theirs}experts.{x}.{matrix}.weight" for x in range(job.model.experts.count))
            found.append(Link((ours + name,), each, STACKED))
    return found


LLAMA = Family(
    model_type="llama",
    values={
        "model.layers": "num_hidden_layers",
        "model.hidden": "hidden_size",
        "model.heads": "num_attention_heads",
        "model.kv_heads": "num_key_value_heads",
        "model.head_dim": "head_dim",
        "model.ffn": "intermediate_size",
        "model.norm_eps": "rms_norm_eps",
        "model.attention.dropout": "attention_dropout",
        "model.init.std": "initializer_range",
        "model.tied": "tie_word_embeddings",
    },
    fixed={
        "model.family": "gpt",
        "model.norm": "rmsnorm",
        "model.norm_position": "pre",
        "model.positions": "rotary",
        "model.activation": "swiglu",
        "model.embedding_norm": False,
        "model.attention.qk_norm": False,
        "model.attention.scale": None,
        "model.unique_layers": None,
        "model.head_scale": 1.0,
        "model.experts.count": 0,
    },
    theirs={"hidden_act": "silu"},
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "default_theta": 10000.0,
    },
    activation="hidden_act",
    read=read,
    write=write,
    links=links,
    spellings=((r"^(?!model\.|lm_head\.)", "model."), (r".*rotary_emb\.inv_freq$", "")),
    copies={"lm_head.weight": "model.embed_tokens.weight"},
)

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    fixed={**LLAMA.fixed, "model.attention.qk_norm": True, "model.bias": False},
    theirs={**LLAMA.theirs, "use_sliding_window": False, "attention_bias": False},
    defaults={**LLAMA.defaults, "head_dim": 128},
    write=write_qwen3,
)

MIXTRAL = replace(
    LLAMA,
    model_type="mixtral",
    values={
        **LLAMA.values,
        "model.experts.count": "num_local_experts",
        "model.experts.top_k": "num_experts_per_tok",
        "model.experts.balance": "router_aux_loss_coef",
        "model.experts.jitter": "router_jitter_noise",
        "model.attention.window": "sliding_window",
    },
    fixed={
        **{name: value for name, value in LLAMA.fixed.items() if name != "model.experts.count"},
        "model.bias": False,
        "model.experts.pattern": "E",
        "model.experts.routing": "tokens",
        "model.experts.score": "softmax",
        "model.experts.normalise": True,
        "model.experts.capacity": None,
        "model.experts.shared": 0,
        "model.experts.bias_rate": 0.0,
    },
    defaults={
        **LLAMA.defaults,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
        "default_theta": 1e6,
    },
    read=read_mixtral,
    write=write_mixtral,
    varied=frozenset({"model.attention.mechanism"}),
)
