"""What the parts of an objective cost: FLOPs of a forward of one row, by which stages are cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headway.pretrain.config import Job, Model
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.mae import decoder_shape
from headway.pretrain.models.sizes import block_flops, end_flops
from headway.pretrain.objectives import Objective
from headway.pretrain.objectives.classify import Classifier
from headway.pretrain.objectives.mae import MaskedAutoencoder
from headway.pretrain.objectives.seq2seq import Seq2SeqLM


@dataclass(frozen=True)
class Costs:
    """FLOPs of a forward of one row; a backward costs twice as much, of each part."""

    embedding: float
    blocks: list[list[float]]
    """Of every tower, of every use of a block."""
    head: float


def costs_of(objective: Objective, job: Job) -> Costs:
    """Costs of an objective's parts."""
    model = job.model
    inputs = inputs_of(objective, job)
    embedding, head = end_flops(job, inputs)
    if isinstance(objective, Seq2SeqLM):
        read, asked = objective.lengths
        towers = [
            _tower(model, model.layers, read),
            _tower(model, model.decoder_depth, asked, causal=True, memory=read),
        ]
        return Costs(embedding, towers, head)
    if isinstance(objective, MaskedAutoencoder):
        small, first = decoder_shape(model, objective.settings), objective.first
        painted = _tower(small, small.layers, objective.patches + first)
        encoder = _tower(model, model.layers, objective.visible + first)
        return Costs(embedding, [encoder, painted], head - sum(painted))
    return Costs(embedding, [_tower(model, model.layers, job.row_tokens, model.family == "gpt")], head)


def _tower(model: Model, layers: int, tokens: int, causal: bool = False, memory: int = 0) -> list[float]:
    """Of every use of a block."""
    repeats = layers // min(layers, model.unique_layers or layers)
    return [block_flops(model, use // repeats, tokens, causal, memory) for use in range(layers)]


def inputs_of(objective: Objective, job: Job) -> Inputs:
    """What the data said when the objective was built."""
    embed: Any = objective.model.embed
    if isinstance(objective, Classifier | MaskedAutoencoder):
        channels = embed.patches.in_features // embed.side**2
        classes = objective.head.out_features if isinstance(objective, Classifier) else 0
        return Inputs(
            length=job.row_tokens, image=embed.grid * embed.side, channels=channels, classes=classes
        )
    length, target = objective.lengths if isinstance(objective, Seq2SeqLM) else (job.data.seq_len, 0)
    return Inputs(vocab=embed.tokens.num_embeddings, length=length, target_length=target)
