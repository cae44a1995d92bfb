"""Rules of attention: words that exist, and models that they suit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from headway.pretrain.errors import JobError

if TYPE_CHECKING:
    from headway.pretrain.config import Job

WHY = {
    "causal": "a causal model needs attention that does not look ahead",
    "bidirectional": "an encoder needs attention to both sides",
    "documents": "rows hold several documents that must not see each other (data.documents or segments)",
    "padding": "rows of this objective are padded",
    "prefix": "objective.name = prefix lets a row's first tokens see each other",
    "dropout": "model.attention.dropout drops weights",
    "grouped": "model.kv_heads is less than model.heads",
    "bias": "model.positions adds a bias to scores",
    "rotary": "model.positions turns queries and keys",
    "entropy": "model.attention.entropy_penalty needs the entropy of weights",
    "scattered": "the encoder of a masked autoencoder reads some of the patches: no grid, no fixed length",
    "images": "only the family vit has a grid of patches",
}
"""What a model may ask of a mechanism, and why it does."""


def check_attention(job: Job) -> None:
    """Raise JobError for unknown words, kernels that they do not have, and models that they do not suit."""
    from headway.kernels.attention.registry import UnknownWord, mechanism

    attention = job.model.attention
    for word in attention.mechanisms:
        field = "model.attention.pattern" if attention.pattern else "model.attention.mechanism"
        try:
            row = mechanism(word)
        except UnknownWord as e:
            raise JobError(field, e.value, e.rule, e.nearest) from None
        for need in _needs(job):
            if need not in row.supports:
                raise JobError(field, word, f"cannot: {WHY[need]}", _nearest(_needs(job)))
        if row.drawn:
            _check_drawn(job, field, word)
        if "images" in row.supports and job.model.family != "vit":
            raise JobError(field, word, WHY["images"], "dense")
        if attention.kernel != "auto" and attention.kernel not in row.kernels:
            rule = f"{word} attention has the kernels {', '.join(row.kernels)}"
            raise JobError("model.attention.kernel", attention.kernel, rule, "auto")


def _check_drawn(job: Job, field: str, word: str) -> None:
    """Raise JobError where the loss that drawn choices are to lower is not known, choice by choice."""
    m, name = job.model, job.objective.name
    pairs = name == "masked" and job.objective.masking.pairs != "none"
    rule = None
    if m.family == "t5" or name == "mae" or pairs:
        lack = "masked with pairs" if pairs else name
        rule = f"learns by a loss of places or rows that choices are weighed by, which objective {lack} does not tell"
    elif m.experts.count:
        rule = "learns by the loss alone, and what balances experts (model.experts) would depend on the choices too"
    if rule:
        raise JobError(field, word, rule, word.replace("reinforce", "hard"))


def _nearest(needs: list[str]) -> str:
    """Words that can do all of it."""
    from headway.kernels.attention.registry import words

    return ", ".join(
        name for name, row in words().items() if {*needs} <= row.supports and "images" not in row.supports
    )


def _needs(job: Job) -> list[str]:
    """What the job asks of every mechanism of its model."""
    m = job.model
    pairs = m.family == "bert" and job.objective.masking.pairs != "none"
    asked = {
        "causal": m.family in ("gpt", "t5"),
        "bidirectional": m.family != "gpt",
        "documents": job.data.documents == "isolate" and m.family in ("gpt", "bert") and not pairs,
        "padding": pairs or m.family == "t5",
        "prefix": job.objective.name == "prefix" and m.family == "gpt",
        "dropout": m.attention.dropout > 0,
        "grouped": m.kv < m.heads,
        "bias": m.biased,
        "rotary": m.positions == "rotary",
        "entropy": m.attention.entropy_penalty != 0,
        "scattered": job.objective.name == "mae",
    }
    return [name for name, wanted in asked.items() if wanted]
