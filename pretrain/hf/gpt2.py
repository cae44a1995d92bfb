"""GPT-2 (Radford et al. 2019) in transformers' names: `GPT2LMHeadModel`."""

from __future__ import annotations

from headway.pretrain.config import Job
from headway.pretrain.hf.family import Family, Settings, is_tied
from headway.pretrain.hf.links import FUSED, TRANSPOSED, Link, layers, link
from headway.pretrain.models.inputs import Inputs

NORMS = {"attention_norm": "ln_1", "mlp_norm": "ln_2"}
PRODUCTS = {"attention.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}


def read(hf: dict, names: frozenset[str]) -> Settings:
    """Settings beyond the table."""
    return {
        "objective.name": "causal",
        "data.seq_len": hf["n_positions"],
        "model.ffn": hf["n_inner"] or 4 * hf["n_embd"],
        "model.tied": is_tied(hf, names, "lm_head.weight"),
    }


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the table."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": inputs.vocab,
        "n_positions": job.model.max_positions or job.data.seq_len,
        "embd_pdrop": job.model.dropout,
    }


def links(job: Job) -> list[Link]:
    """Where the tensors are."""
    found = [
        link("model.embed.tokens.weight", "transformer.wte.weight"),
        link("model.embed.positions.weight", "transformer.wpe.weight"),
        link("head.weight", "lm_head.weight"),
        *layers({"model.norm": "transformer.ln_f"}),
    ]
    for i in range(job.model.layers):
        ours, theirs = f"model.blocks.{i}.", f"transformer.h.{i}."
        found += layers(NORMS, ours, theirs)
        found += layers(PRODUCTS, ours, theirs, change=TRANSPOSED)
        for kind in ("weight", "bias"):
            parts = tuple(f"{ours}attention.{name}.{kind}" for name in "qkv")
            found.append(Link(parts, (f"{theirs}attn.c_attn.{kind}",), FUSED))
    return found


GPT2 = Family(
    model_type="gpt2",
    values={
        "model.layers": "n_layer",
        "model.hidden": "n_embd",
        "model.heads": "n_head",
        "model.ffn": "n_inner",
        "model.max_positions": "n_positions",
        "model.norm_eps": "layer_norm_epsilon",
        "model.dropout": "resid_pdrop",  # of embeddings too: GPT-2 uses one rate for all
        "model.attention.dropout": "attn_pdrop",
        "model.init.std": "initializer_range",
        "model.tied": "tie_word_embeddings",
    },
    fixed={
        "model.family": "gpt",
        "model.norm": "layernorm",
        "model.norm_position": "pre",
        "model.positions": "learned",
        "model.bias": True,
        "model.embedding_norm": False,
        "model.attention.qk_norm": False,
        "model.attention.scale": None,
        "model.unique_layers": None,
        "model.head_scale": 1.0,
        "model.experts.count": 0,
    },
    theirs={
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    defaults={
        "n_inner": None,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "resid_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    activation="activation_function",
    read=read,
    write=write,
    links=links,
    spellings=((r"^(?!transformer\.|lm_head\.)", "transformer."), (r".*\.attn\.(masked_)?bias$", "")),
    copies={"lm_head.weight": "transformer.wte.weight"},
)
