"""Parameters, FLOPs and bytes from the configuration alone: no model is built.

A family is a table of parts, each with its parameters and the FLOPs of its products on one row of the batch. Every
product counts 2 FLOPs a weight, attention counts the pairs that are seen (causal: half of the square); norms,
activations and lookups count nothing. This is the convention of model FLOPs utilisation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from headway.kernels.attention.registry import mechanism
from headway.pretrain.config import Job, Model
from headway.pretrain.models import bottleneck
from headway.pretrain.models.attention import attention_shape, word_of
from headway.pretrain.models.cost import Cost, linear, mlp, norm, projections, total
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.mae import decoder_shape
from headway.pretrain.models.mixers import MIXERS
from headway.pretrain.models.seat import Seat


class Parameters(NamedTuple):
    """Counts of parameters.

    Attributes:
        embedding: tables of tokens, positions and segments, patches, tokens before them.
        blocks: all blocks and what they share (tables of relative positions).
        heads: final norms, pooler, what the objective owns; a tied head counts as embedding.
        active: parameters that one token meets: all but the experts that it is not sent to.
    """

    embedding: int
    blocks: int
    heads: int
    active: int

    @property
    def total(self) -> int:
        return self.embedding + self.blocks + self.heads


def parameters(job: Job, inputs: Inputs) -> Parameters:
    """Parameters of the job's model with its objective's heads.

    Args:
        job: shape and objective.
        inputs: sizes that the data gives: vocabulary, lengths, image, classes.
    """
    embedding, blocks, heads = (total(costs) for costs in _table(job, inputs))
    active = embedding.parameters + blocks.parameters + heads.parameters - blocks.idle
    return Parameters(embedding.parameters, blocks.parameters, heads.parameters, active)


def forward_flops(job: Job, inputs: Inputs) -> float:
    """FLOPs of a forward of one row of the batch: a sequence, a pair of sequences, an image.

    Heads count the tokens that they are applied to: masked ones only (BERT), one a row (classifiers). A masked
    autoencoder's blocks count visible patches only. A token counts `top_k` experts, whatever capacity drops.
    """
    return sum(total(costs).flops for costs in _table(job, inputs))


def block_flops(model: Model, layer: int, tokens: int, causal: bool = False, memory: int = 0) -> float:
    """FLOPs of a forward of one row through a block.

    Args:
        model: shape of the block.
        layer: its place, which says whether it has experts.
        tokens: of the row.
        causal: whether a token sees earlier ones only.
        memory: tokens of the encoder, for cross-attention; 0 has none.
    """
    return total(_block(model, layer, tokens, causal, memory)).flops


def end_flops(job: Job, inputs: Inputs) -> tuple[float, float]:
    """FLOPs of a forward of one row through the embedding, and through all that follows the model's blocks (of a
    masked autoencoder, its decoder too)."""
    embedding, _, heads = (total(costs) for costs in _table(job, inputs))
    return embedding.flops, heads.flops


def backward_flops(job: Job, inputs: Inputs) -> float:
    """FLOPs of one row's backward without recomputation: two products for each of the forward's."""
    return 2 * forward_flops(job, inputs)


def training_flops(job: Job, inputs: Inputs) -> float:
    """FLOPs of one row's forward and backward."""
    return 3 * forward_flops(job, inputs)


def weight_bytes(job: Job, inputs: Inputs, itemsize: int = 4) -> int:
    """Bytes of all weights."""
    return parameters(job, inputs).total * itemsize


def training_bytes(job: Job, inputs: Inputs, itemsize: int = 4) -> int:
    """Bytes of weights, gradients and AdamW's two moments, all of one width, before any sharding."""
    return 4 * weight_bytes(job, inputs, itemsize)


def block_cost(model: Model, layer: int, tokens: int, causal: bool = False, memory: int = 0) -> Cost:
    """A block's parameters, and the FLOPs of one row's forward; arguments as in `_stack`, `layer` from 0."""
    return total(_block(model, layer, tokens, causal, memory))


# Families: (embedding, blocks, heads)

Table = tuple[list[Cost], list[Cost], list[Cost]]


def _table(job: Job, inputs: Inputs) -> Table:
    return {"gpt": _gpt, "bert": _bert, "t5": _t5, "vit": _vit}[job.model.family](job, inputs)


def _gpt(job: Job, inputs: Inputs) -> Table:
    m, n = job.model, inputs.length
    return (
        _embedding(m, inputs),
        _stack(m, m.layers, n, causal=True),
        [_final_norm(m), _language_head(m, inputs, n)],
    )


def _bert(job: Job, inputs: Inputs) -> Table:
    m, n = job.model, inputs.length
    width, masked = m.word_width, job.objective.masking.rate * n
    pairs = job.objective.masking.pairs != "none"
    return (
        _embedding(m, inputs),
        _stack(m, m.layers, n),
        [
            _final_norm(m),
            linear(m.hidden, m.hidden, True, 1) if m.pooler else Cost(),
            linear(m.hidden, width, True, masked),  # transform
            norm(m, width),
            _language_head(m, inputs, masked),
            Cost(inputs.vocab),  # bias of the head
            linear(m.hidden, 2, True, 1) if pairs else Cost(),
        ],
    )


def _t5(job: Job, inputs: Inputs) -> Table:
    m, n, target = job.model, inputs.length, inputs.target_length
    relative = Cost(m.relative_buckets * m.heads if m.positions == "relative" else 0)
    return (
        _embedding(m, inputs),
        [
            *_stack(m, m.layers, n),
            relative,
            *_stack(m, m.decoder_depth, target, causal=True, memory=n),
            relative,
        ],
        [_final_norm(m), _final_norm(m), _language_head(m, inputs, target)],
    )


def _vit(job: Job, inputs: Inputs) -> Table:
    m, mae = job.model, job.objective.mae
    patches = (inputs.image // m.vision.patch) ** 2
    pixels, first = m.vision.patch**2 * inputs.channels, m.vision.prefix_tokens
    embedding = [
        linear(pixels, m.hidden, True, patches),
        Cost(m.hidden * first),
        Cost((patches + first) * m.hidden if m.positions == "learned" else 0),
        norm(m, m.hidden) if m.embedding_norm else Cost(),
    ]
    if job.objective.name == "classify":
        head = linear(m.hidden, inputs.classes, True, 1)
        heads = [head] * (2 if m.vision.distill_token else 1)
        return embedding, _stack(m, m.layers, patches + first), [_final_norm(m), *heads]
    seen, small = max(1, int(patches * (1 - mae.rate))), decoder_shape(m, mae)
    return (
        embedding,
        _stack(m, m.layers, seen + first),
        [
            _final_norm(m),
            linear(m.hidden, mae.hidden, True, seen + first),
            Cost(mae.hidden),  # mask token
            *_stack(small, mae.layers, patches + first),
            _final_norm(small),
            linear(mae.hidden, pixels, True, patches),
        ],
    )


# Parts


def _final_norm(model: Model) -> Cost:
    return norm(model, model.hidden) if model.norm_position == "pre" else Cost()


def _embedding(model: Model, inputs: Inputs) -> list[Cost]:
    """Tables of a model of text, and the projection from their width to the model's (of three rows: MobileBERT)."""
    table, tokens = model.table_width, inputs.length + inputs.target_length
    trigram, width = model.embedding_trigram, model.hidden if model.embedding_trigram else table
    projected = model.embedding_size or trigram
    rows = model.max_positions or max(inputs.length, inputs.target_length)
    return [
        Cost(inputs.vocab * table),
        Cost(rows * width if model.positions == "learned" else 0),
        Cost(model.segments * width),
        norm(model, width) if model.embedding_norm else Cost(),
        linear((3 if trigram else 1) * table, model.hidden, True, tokens) if projected else Cost(),
    ]


def _language_head(model: Model, inputs: Inputs, tokens: float) -> Cost:
    shared = model.table_width if model.tied else 0
    return linear(model.word_width, inputs.vocab, False, tokens)._replace(
        parameters=(model.word_width - shared) * inputs.vocab
    )


def _stack(model: Model, layers: int, tokens: int, causal: bool = False, memory: int = 0) -> list[Cost]:
    """Blocks; those that share weights (ALBERT) count their parameters once.

    Args:
        model: shape of a block.
        layers: blocks that a row passes.
        tokens: of a row.
        causal: whether a token sees earlier ones only.
        memory: tokens of the encoder, for cross-attention; 0 has none.
    """
    own = min(layers, model.unique_layers or layers)
    return [
        cost._replace(flops=cost.flops * (layers // own))
        for layer in range(own)
        for cost in _block(model, layer, tokens, causal, memory)
    ]


def _block(model: Model, layer: int, tokens: int, causal: bool, memory: int) -> list[Cost]:
    seat = Seat(layer, causal, tokens=tokens)
    if model.bottleneck.hidden:
        around = bottleneck.parts(model, tokens)
        return [*around, *_plain_block(*bottleneck.inside(model, seat), memory)]
    return _plain_block(model, seat, memory)


def _plain_block(model: Model, seat: Seat, memory: int) -> list[Cost]:
    """A block, or what is between the linear layers of its bottleneck."""
    layer, tokens = seat.layer, seat.tokens
    cross = _heads(model, seat._replace(cross=True, causal=False), tokens, memory) if memory else []
    feed_forward = _experts if model.has_experts(layer) else mlp
    return [
        *_mixer(model, seat),
        *cross,
        *feed_forward(model, tokens),
        *[norm(model, model.hidden)] * (3 if memory else 2),
        *[Cost(model.hidden if model.layer_scale else 0)] * 2,
    ]


def _mixer(model: Model, seat: Seat) -> list[Cost]:
    """What mixes the tokens of a sequence."""
    word = word_of(model.attention, seat)
    if mechanism(word).kind == "mixer":
        return MIXERS[word].parts(model, seat, attention_shape(model, word, seat).settings)
    return _heads(model, seat, seat.tokens, seat.tokens)


def _heads(model: Model, seat: Seat, queries: int, keys: int) -> list[Cost]:
    """Projections, what the mechanism owns, and the pairs."""
    word = word_of(model.attention, seat)
    row = mechanism(word)
    shape = attention_shape(model, word, seat)._replace(queries=queries, keys=keys)
    own = sum(math.prod(own.shape(shape)) for own in row.own.values())
    gates = [model.heads * width(shape) for width in row.gates.values()]
    inputs = seat.inputs or model.hidden
    return [
        *projections(model, queries, keys, seat),
        *(linear(inputs, width, model.bias, queries, int(model.spectral)) for width in gates),
        linear(inputs, 1, True, queries) if row.drawn else Cost(),
        Cost(own, row.flops(shape)),
    ]


def _experts(model: Model, tokens: int) -> list[Cost]:
    """Router, routed experts (a token meets `top_k` of them), shared experts (it meets all)."""
    x = model.experts
    width = x.ffn or model.ffn_width
    one = total(mlp(model.model_copy(update={"spectral": False}), tokens, width))
    return [
        linear(model.hidden, x.count, False, tokens),
        Cost(x.count * one.parameters, x.top_k * one.flops, (x.count - x.top_k) * one.parameters),
        *(mlp(model, tokens, x.shared * width) if x.shared else []),
    ]
