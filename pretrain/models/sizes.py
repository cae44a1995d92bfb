"""Parameters, FLOPs and bytes from the configuration alone: no model is built."""

from __future__ import annotations

from dataclasses import dataclass

from headway.kernels.attention.registry import MECHANISMS
from headway.pretrain import config


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters.

    Attributes:
        embedding: token and position tables.
        block: one block.
        layers: blocks.
        norm: the final norm.
        head: 0 where it shares the token table.
    """

    embedding: int
    block: int
    layers: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        return self.embedding + self.block * self.layers + self.norm + self.head


def parameters(model: config.Model, vocab: int, seq_len: int) -> Parameters:
    """Parameters of a GPT with its head.

    Args:
        model: the shape.
        vocab: rows of the token table.
        seq_len: rows of the learned position table, unless `model.max_positions` says otherwise.
    """
    e = model.hidden
    rows = (model.max_positions or seq_len) if model.positions == "learned" else 0
    norm = e * (2 if model.norm == "layernorm" and model.bias else 1)
    biases = sum(width for _, width in _products(model)) if model.bias else 0
    qk_norm = 2 * model.head_width if model.attention.qk_norm else 0
    return Parameters(
        embedding=(vocab + rows) * e,
        block=_block_weights(model) + biases + qk_norm + 2 * norm,
        layers=model.layers,
        norm=norm if model.norm_position == "pre" else 0,
        head=0 if model.tied else vocab * e,
    )


def forward_flops(model: config.Model, vocab: int, seq_len: int) -> float:
    """FLOPs per token of a forward: every product counts 2 a weight, attention counts the pairs that are seen.

    The convention of model FLOPs utilisation, with causal attention counted as what it is: half of the square.
    """
    attention = MECHANISMS[model.attention.mechanism].flops(model.heads, model.head_width, seq_len, True)
    products = model.layers * _block_weights(model) + vocab * model.hidden
    return 2 * products + model.layers * attention / seq_len


def backward_flops(model: config.Model, vocab: int, seq_len: int) -> float:
    """FLOPs per token of a backward without recomputation: two products for each of the forward's."""
    return 2 * forward_flops(model, vocab, seq_len)


def training_flops(model: config.Model, vocab: int, seq_len: int) -> float:
    """FLOPs per token of forward and backward."""
    return 3 * forward_flops(model, vocab, seq_len)


def weight_bytes(model: config.Model, vocab: int, seq_len: int, itemsize: int = 4) -> int:
    """Bytes of all weights."""
    return parameters(model, vocab, seq_len).total * itemsize


def training_bytes(model: config.Model, vocab: int, seq_len: int, itemsize: int = 4) -> int:
    """Bytes of weights, gradients and AdamW's two moments, all of one width, before any sharding."""
    return 4 * weight_bytes(model, vocab, seq_len, itemsize)


def _products(model: config.Model) -> list[tuple[int, int]]:
    """(inputs, outputs) of a block's linear layers."""
    e, d, f = model.hidden, model.head_width, model.ffn_width
    heads, kv = model.heads * d, model.kv * d
    return [(e, heads), (e, kv), (e, kv), (heads, e), (e, f), (f, e), *([(e, f)] if model.gated else [])]


def _block_weights(model: config.Model) -> int:
    return sum(inputs * outputs for inputs, outputs in _products(model))
