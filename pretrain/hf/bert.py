"""BERT (Devlin et al. 2019) and ALBERT (Lan et al. 2020) in transformers' names.

`BertForPreTraining` and `AlbertForPreTraining` with sentence pairs, `BertForMaskedLM` and `AlbertForMaskedLM`
without. ALBERT factors the token table and shares the weights of its blocks.
"""

from __future__ import annotations

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.family import Family, Settings, is_tied
from headway.pretrain.hf.links import TWICE, Link, layers, link
from headway.pretrain.models.inputs import Inputs

EMBEDDINGS = {
    "model.embed.tokens": "embeddings.word_embeddings",
    "model.embed.positions": "embeddings.position_embeddings",
    "model.embed.segments": "embeddings.token_type_embeddings",
    "model.embed.norm": "embeddings.LayerNorm",
}
BERT_BLOCK = {
    "attention.q": "attention.self.query",
    "attention.k": "attention.self.key",
    "attention.v": "attention.self.value",
    "attention.o": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
ALBERT_BLOCK = {
    "attention.q": "attention.query",
    "attention.k": "attention.key",
    "attention.v": "attention.value",
    "attention.o": "attention.dense",
    "attention_norm": "attention.LayerNorm",
    "mlp.up": "ffn",
    "mlp.down": "ffn_output",
    "mlp_norm": "full_layer_layer_norm",
}
BERT_HEAD = {
    "head.transform": "cls.predictions.transform.dense",
    "head.norm": "cls.predictions.transform.LayerNorm",
}
ALBERT_HEAD = {"head.transform": "predictions.dense", "head.norm": "predictions.LayerNorm"}


def read(hf: dict, names: frozenset[str]) -> Settings:
    """Settings beyond the tables, of both."""
    if hf.get("position_embedding_type", "absolute") != "absolute":
        rule = "Headway's BERT has learned absolute positions"
        raise JobError(
            "config.json: position_embedding_type", hf["position_embedding_type"], rule, "absolute"
        )
    head = {"bert": "cls.predictions.decoder.weight", "albert": "predictions.decoder.weight"}[
        hf["model_type"]
    ]
    pair = {"bert": "next", "albert": "order"}[hf["model_type"]]
    paired = names & {"cls.seq_relationship.weight", "sop_classifier.classifier.weight"}
    return {
        "objective.name": "masked",
        "model.init.scheme": "bert",
        "data.seq_len": hf["max_position_embeddings"],
        "model.tied": is_tied(hf, names, head),
        "model.pooler": bool(names & {"bert.pooler.dense.weight", "albert.pooler.weight"}),
        "objective.masking.pairs": pair if paired else "none",
    }


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the tables, of both."""
    return {
        "vocab_size": inputs.vocab,
        "max_position_embeddings": job.model.max_positions or job.data.seq_len,
        "position_embedding_type": "absolute",
    }


def write_bert(job: Job, inputs: Inputs) -> dict:
    """BERT's keys beyond the tables."""
    kind = "MaskedLM" if job.objective.masking.pairs == "none" else "PreTraining"
    return write(job, inputs) | {"architectures": [f"BertFor{kind}"]}


def write_albert(job: Job, inputs: Inputs) -> dict:
    """ALBERT's keys beyond the tables."""
    kind = "MaskedLM" if job.objective.masking.pairs == "none" else "PreTraining"
    groups = job.model.unique_layers or job.model.layers
    return write(job, inputs) | {
        "architectures": [f"AlbertFor{kind}"],
        "num_hidden_groups": groups,
        "classifier_dropout_prob": 0.1,
    }


def links_bert(job: Job) -> list[Link]:
    """Where BERT's tensors are."""
    found = layers(EMBEDDINGS, theirs="bert.")
    found += layers({"model.pooler": "bert.pooler.dense", "pair": "cls.seq_relationship", **BERT_HEAD})
    found += head_links(job, "cls.predictions.")
    for i in range(job.model.layers):
        found += layers(BERT_BLOCK, f"model.blocks.{i}.", f"bert.encoder.layer.{i}.")
    return found


def links_albert(job: Job) -> list[Link]:
    """Where ALBERT's tensors are."""
    found = layers(EMBEDDINGS, theirs="albert.")
    found += layers({"model.embed.project": "albert.encoder.embedding_hidden_mapping_in"})
    found += layers({"model.pooler": "albert.pooler", "pair": "sop_classifier.classifier", **ALBERT_HEAD})
    found += head_links(job, "predictions.")
    for i in range(job.model.unique_layers or job.model.layers):
        theirs = f"albert.encoder.albert_layer_groups.{i}.albert_layers.0."
        found += layers(ALBERT_BLOCK, f"model.blocks.{i}.", theirs)
    return found


def head_links(job: Job, theirs: str) -> list[Link]:
    """Weight and bias of the head. transformers adds the bias of `decoder`, which is `bias` where it is tied."""
    if job.model.tied:
        return [link("head.bias", f"{theirs}bias")]
    bias = Link(("head.bias",), (f"{theirs}decoder.bias", f"{theirs}bias"), TWICE)
    return [link("head.weight", f"{theirs}decoder.weight"), bias]


BERT = Family(
    model_type="bert",
    values={
        "model.layers": "num_hidden_layers",
        "model.hidden": "hidden_size",
        "model.heads": "num_attention_heads",
        "model.ffn": "intermediate_size",
        "model.max_positions": "max_position_embeddings",
        "model.segments": "type_vocab_size",
        "model.norm_eps": "layer_norm_eps",
        "model.dropout": "hidden_dropout_prob",
        "model.attention.dropout": "attention_probs_dropout_prob",
        "model.init.std": "initializer_range",
        "model.tied": "tie_word_embeddings",
    },
    fixed={
        "model.family": "bert",
        "model.norm": "layernorm",
        "model.norm_position": "post",
        "model.embedding_norm": True,
        "model.embedding_size": None,
        "model.unique_layers": None,
        "model.positions": "learned",
        "model.bias": True,
        "model.attention.qk_norm": False,
        "model.attention.scale": None,
        "model.head_scale": 1.0,
        "model.experts.count": 0,
    },
    theirs={"is_decoder": False, "add_cross_attention": False},
    defaults={
        "hidden_act": "gelu",
        "type_vocab_size": 2,
        "layer_norm_eps": 1e-12,
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
    },
    activation="hidden_act",
    read=read,
    write=write_bert,
    links=links_bert,
    spellings=(
        (r"LayerNorm\.gamma$", "LayerNorm.weight"),
        (r"LayerNorm\.beta$", "LayerNorm.bias"),
        (r"^(?!bert\.|cls\.)", "bert."),
        (r".*\.position_ids$", ""),
    ),
    copies={
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    },
)

ALBERT = Family(
    model_type="albert",
    values={
        **BERT.values,
        "model.embedding_size": "embedding_size",
        "model.unique_layers": "num_hidden_groups",
    },
    fixed={
        name: value
        for name, value in BERT.fixed.items()
        if name not in ("model.embedding_size", "model.unique_layers")
    },
    theirs={"inner_group_num": 1},
    defaults={
        **BERT.defaults,
        "embedding_size": 128,
        "num_hidden_groups": 1,
        "hidden_act": "gelu_new",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
    activation="hidden_act",
    read=read,
    write=write_albert,
    links=links_albert,
    spellings=(
        (r"^(?!albert\.|predictions\.|sop_classifier\.)", "albert."),
        (r".*\.position_ids$", ""),
    ),
    copies={
        "predictions.decoder.weight": "albert.embeddings.word_embeddings.weight",
        "predictions.decoder.bias": "predictions.bias",
    },
)
