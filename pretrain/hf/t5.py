"""T5 (Raffel et al. 2020), version 1.0 and 1.1, in transformers' names: `T5ForConditionalGeneration`.

Version 1.0 has ReLU and a tied head that reads hidden states / sqrt(hidden); version 1.1 a gated GELU and a head of
its own. transformers 5 says in `scale_decoder_outputs` what transformers 4 concludes from `tie_word_embeddings`.
"""

from __future__ import annotations

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.family import Family, Settings, is_tied
from headway.pretrain.hf.links import Link, layers, link
from headway.pretrain.models.inputs import Inputs

ROW = 512
"""Tokens of a row after import: T5's own. Relative positions have no longest row."""

FEED_FORWARD = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_new",
    "silu": "silu",
    "geglu_tanh": "gated-gelu",  # transformers reads it as gated gelu_new
    "swiglu": "gated-silu",
}
"""Ours -> `feed_forward_proj`."""
PRODUCTS = ("q", "k", "v", "o")


def read(hf: dict, names: frozenset[str]) -> Settings:
    """Settings beyond the table."""
    spelled = {theirs: ours for ours, theirs in FEED_FORWARD.items()}
    if hf["feed_forward_proj"] not in spelled:
        rule = f"Headway has {', '.join(spelled)}"
        raise JobError("config.json: feed_forward_proj", hf["feed_forward_proj"], rule)
    scaled = hf.get("scale_decoder_outputs", hf["tie_word_embeddings"])
    return {
        "objective.name": "spans",
        "model.init.scheme": "t5",
        "data.seq_len": ROW,
        "model.activation": spelled[hf["feed_forward_proj"]],
        "model.decoder_layers": hf.get("num_decoder_layers") or hf["num_layers"],
        "model.attention.dropout": hf["dropout_rate"],
        "model.attention.scale": 1.0,
        # transformers 5 writes `tie_word_embeddings: true` for both versions: the tensors decide
        "model.tied": is_tied(hf, names, "lm_head.weight"),
        "model.head_scale": hf["d_model"] ** -0.5 if scaled else 1.0,
    }


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the table."""
    model, scale = job.model, job.model.hidden**-0.5
    if model.head_scale not in (1.0, scale):
        rule = "T5 of Hugging Face scales by 1 or by 1 / sqrt(hidden)"
        raise JobError("model.head_scale", model.head_scale, rule, scale if model.tied else 1.0)
    if model.activation not in FEED_FORWARD:
        rule = f"T5 of Hugging Face has {', '.join(FEED_FORWARD)}"
        raise JobError("model.activation", model.activation, rule, "geglu_tanh" if model.gated else "relu")
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": inputs.vocab,
        "feed_forward_proj": FEED_FORWARD[model.activation],
        "tie_word_embeddings": model.tied,
        "scale_decoder_outputs": model.head_scale != 1.0,
        "initializer_factor": 1.0,
    }


def links(job: Job) -> list[Link]:
    """Where the tensors are."""
    found = [
        link("model.embed.tokens.weight", "shared.weight"),
        link("head.weight", "lm_head.weight"),
    ]
    for side, depth in (("encoder", job.model.layers), ("decoder", job.model.decoder_depth)):
        ours = f"model.{side}."
        found.append(link(f"{ours}norm.weight", f"{side}.final_layer_norm.weight"))
        bias = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(link(f"{ours}relative.table.weight", bias))
        for i in range(depth):
            table = block(decoder=side == "decoder", gated=job.model.gated)
            found += layers(table, f"{ours}blocks.{i}.", f"{side}.block.{i}.layer.", kinds=("weight",))
    return found


def block(decoder: bool, gated: bool) -> dict[str, str]:
    """Layers of a block: self-attention, cross-attention in decoders, feed-forward."""
    table = {"attention_norm": "0.layer_norm"}
    table |= {f"attention.{p}": f"0.SelfAttention.{p}" for p in PRODUCTS}
    if decoder:
        table |= {"cross_norm": "1.layer_norm"}
        table |= {f"cross.{p}": f"1.EncDecAttention.{p}" for p in PRODUCTS}
    last = f"{1 + decoder}.DenseReluDense."
    table |= {"mlp_norm": f"{1 + decoder}.layer_norm", "mlp.down": f"{last}wo"}
    return table | (
        {"mlp.gate": f"{last}wi_0", "mlp.up": f"{last}wi_1"} if gated else {"mlp.up": f"{last}wi"}
    )


T5 = Family(
    model_type="t5",
    values={
        "model.layers": "num_layers",
        "model.decoder_layers": "num_decoder_layers",
        "model.hidden": "d_model",
        "model.heads": "num_heads",
        "model.head_dim": "d_kv",
        "model.ffn": "d_ff",
        "model.relative_buckets": "relative_attention_num_buckets",
        "model.relative_distance": "relative_attention_max_distance",
        "model.norm_eps": "layer_norm_epsilon",
        "model.dropout": "dropout_rate",
    },
    fixed={
        "model.family": "t5",
        "model.norm": "rmsnorm",
        "model.norm_position": "pre",
        "model.positions": "relative",
        "model.bias": False,
        "model.embedding_norm": False,
        "model.attention.qk_norm": False,
        "model.attention.scale": 1.0,
        "model.unique_layers": None,
        "model.experts.count": 0,
    },
    theirs={"is_encoder_decoder": True},
    defaults={
        "num_decoder_layers": None,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "tie_word_embeddings": True,
    },
    activation=None,
    read=read,
    write=write,
    links=links,
    spellings=((r".*\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight$", ""),),
    copies={
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    },
)
