"""MobileBERT and its teacher IB-BERT (Sun et al. 2020) in transformers' names.

`MobileBertForPreTraining` with sentence pairs, `MobileBertForMaskedLM` without. transformers computes less than its
settings can say: queries and keys read the width inside, whatever they are given, so an inverted bottleneck whose
attention reads the block's input (IB-BERT's) is Headway's alone.
"""

from __future__ import annotations

import torch

from headway.pretrain.config import Job
from headway.pretrain.errors import JobError
from headway.pretrain.hf.bert import BERT, BERT_BLOCK, BERT_HEAD, EMBEDDINGS
from headway.pretrain.hf.family import Family, Settings, is_tied
from headway.pretrain.hf.links import TRANSPOSED, TWICE, Change, Link, layers, link
from headway.pretrain.models.inputs import Inputs

NORMS = {"affine": "no_norm", "layernorm": "layer_norm"}
"""Ours -> Hugging Face's."""
EPS = 1e-5
"""Of the norm behind a block's last feed-forward layer there, whatever `layer_norm_eps` says."""
READS = {(False, True): "shared", (False, False): "outside", (True, False): "inside"}
"""(use_bottleneck_attention, key_query_shared_bottleneck) -> `model.bottleneck.reads`."""
HEAD, DECODER, DENSE = "cls.predictions.", "cls.predictions.decoder.weight", "cls.predictions.dense.weight"
BOTTLENECK = {
    "bottleneck.entry": "bottleneck.input.dense",
    "bottleneck.entry_norm": "bottleneck.input.LayerNorm",
    "bottleneck.shared": "bottleneck.attention.dense",
    "bottleneck.shared_norm": "bottleneck.attention.LayerNorm",
    "bottleneck.exit": "output.bottleneck.dense",
    "bottleneck.exit_norm": "output.bottleneck.LayerNorm",
}
FFN = {"mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm"}


def read(hf: dict, names: frozenset[str]) -> Settings:
    """Settings beyond the tables."""
    kinds = {theirs: ours for ours, theirs in NORMS.items()}
    if hf["normalization_type"] not in kinds:
        kind, rule = hf["normalization_type"], f"Headway has {', '.join(kinds)}"
        raise JobError("config.json: normalization_type", kind, rule)
    norm, ways = (
        kinds[hf["normalization_type"]],
        (hf["use_bottleneck_attention"], hf["key_query_shared_bottleneck"]),
    )
    if ways not in READS:
        rule = "with use_bottleneck_attention, a shared bottleneck has weights that nothing reads"
        raise JobError("config.json: key_query_shared_bottleneck", True, rule, False)
    if norm == "layernorm" and hf["layer_norm_eps"] != EPS:
        rule = f"transformers gives some of a block's norms {EPS} whatever this says, and Headway's have one value"
        raise JobError("config.json: layer_norm_eps", hf["layer_norm_eps"], rule, EPS)
    return {
        "objective.name": "masked",
        "model.init.scheme": "bert",
        "data.seq_len": hf["max_position_embeddings"],
        "model.norm": norm,
        "model.bottleneck.reads": READS[ways],
        "model.tied": is_tied(hf, names, DECODER),
        "model.pooler": "mobilebert.pooler.dense.weight" in names,
        "objective.masking.pairs": "next" if "cls.seq_relationship.weight" in names else "none",
    }


def write(job: Job, inputs: Inputs) -> dict:
    """Keys beyond the tables.

    Raises:
        JobError: transformers has no such model.
    """
    m, b = job.model, job.model.bottleneck
    if b.hidden is None:
        raise JobError("model.bottleneck.hidden", None, "a MobileBERT has a bottleneck in every block", 128)
    if m.embedding_size is None:
        raise JobError("model.embedding_size", None, "a MobileBERT's table has a width of its own", 128)
    if m.norm not in NORMS:
        raise JobError("model.norm", m.norm, f"a MobileBERT of Hugging Face has {', '.join(NORMS)}", "affine")
    if m.norm == "layernorm" and m.norm_eps != EPS:
        rule = f"transformers gives some of a MobileBERT's norms {EPS}, whatever its config.json says"
        raise JobError("model.norm_eps", m.norm_eps, rule, EPS)
    if b.reads == "outside" and b.hidden != m.hidden:
        rule = (
            f"in transformers attention can read a block's input only if model.bottleneck.hidden = {m.hidden}"
        )
        raise JobError("model.bottleneck.reads", b.reads, rule, "shared")
    inside, shared = next(ways for ways, reads in READS.items() if reads == b.reads)
    kind = "MaskedLM" if job.objective.masking.pairs == "none" else "PreTraining"
    return {
        "architectures": [f"MobileBertFor{kind}"],
        "vocab_size": inputs.vocab,
        "max_position_embeddings": inputs.length,
        "normalization_type": NORMS[m.norm],
        "use_bottleneck_attention": inside,
        "key_query_shared_bottleneck": shared,
        "classifier_activation": m.pooler,
    }


def links(job: Job) -> list[Link]:
    """Where the tensors are."""
    found = layers(EMBEDDINGS, theirs="mobilebert.")
    found += layers({"model.embed.project": "mobilebert.embeddings.embedding_transformation", **BERT_HEAD})
    found += layers({"model.pooler": "mobilebert.pooler.dense", "pair": "cls.seq_relationship"})
    found += _head(job)
    count = job.model.bottleneck.ffns - 1
    for i in range(job.model.layers):
        ours, theirs = f"model.blocks.{i}.", f"mobilebert.encoder.layer.{i}."
        found += layers(BERT_BLOCK | BOTTLENECK, ours, theirs)
        for j in range(count):
            found += layers(FFN, f"{ours}bottleneck.ffns.{j}.", f"{theirs}ffn.{j}.")
    return found


def _head(job: Job) -> list[Link]:
    """Weights and bias of the head: the table's columns, and columns of its own."""
    if job.model.tied:
        return [link("head.extra", DENSE, TRANSPOSED), link("head.bias", f"{HEAD}bias")]
    table = job.model.table_width
    beside = Change(
        lambda x: [x[0][:, :table], x[0][:, table:].mT], lambda x: [torch.cat((x[0], x[1].mT), 1)]
    )
    bias = Link(("head.bias",), (f"{HEAD}decoder.bias", f"{HEAD}bias"), TWICE)
    return [Link(("head.weight",), (DECODER, DENSE), beside), bias]


MOBILEBERT = Family(
    model_type="mobilebert",
    values={
        **BERT.values,
        "model.embedding_size": "embedding_size",
        "model.bottleneck.hidden": "intra_bottleneck_size",
        "model.bottleneck.ffns": "num_feedforward_networks",
    },
    fixed={
        name: value
        for name, value in BERT.fixed.items()
        if name not in ("model.norm", "model.embedding_size")
    }
    | {"model.embedding_trigram": True},
    theirs={"use_bottleneck": True, "trigram_input": True},
    defaults={
        **BERT.defaults,
        "hidden_act": "relu",
        "hidden_dropout_prob": 0.0,
        "embedding_size": 128,
        "intra_bottleneck_size": 128,
        "num_feedforward_networks": 4,
        "normalization_type": "no_norm",
        "use_bottleneck_attention": False,
        "key_query_shared_bottleneck": True,
    },
    activation="hidden_act",
    read=read,
    write=write,
    links=links,
    spellings=(
        (r"^(?!mobilebert\.|cls\.)", "mobilebert."),
        (r".*\.position_ids$", ""),
    ),
    copies={
        DECODER: "mobilebert.embeddings.word_embeddings.weight",
        f"{HEAD}decoder.bias": f"{HEAD}bias",
    },
)
