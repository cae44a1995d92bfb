"""The bottleneck of a block: what leads from the residual stream to the width inside, and back (Sun et al. 2020).

MobileBERT's blocks are narrower inside than the stream between them, and its teacher's (IB-BERT) are wider, so that
student and teacher have feature maps of one width.

Shapes: B batch, S sequence, E hidden size (outside), I width inside.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headway.pretrain import config
from headway.pretrain.models.cost import Cost, linear, mlp, norm
from headway.pretrain.models.layers import (
    MLP,
    Dropout,
    Noise,
    StochasticDepth,
    build_linear,
    build_norm,
    narrowed,
    summed,
)
from headway.pretrain.models.seat import Seat


def inside(model: config.Model, seat: Seat) -> tuple[config.Model, Seat]:
    """A block's shape and seat between the linear layers of its bottleneck: a block of the width inside, whose
    attention reads what `bottleneck.reads` says. Dropped, scaled and skipped is what leaves the bottleneck alone."""
    reads, off = model.bottleneck.reads, {"dropout": 0.0, "stochastic_depth": 0.0, "layer_scale": None}
    own = {"hidden": model.inner_width, "bottleneck": config.Bottleneck()}
    inputs = model.hidden if reads == "outside" else 0
    values = 0 if reads == "inside" else model.hidden
    return model.model_copy(update=own | off), seat._replace(inputs=inputs, values=values)


def parts(model: config.Model, tokens: int) -> list[Cost]:
    """Parameters and FLOPs on `tokens` of a row of what a bottleneck adds to the block inside."""
    e, i, bias, gains = model.hidden, model.inner_width, model.bias, int(model.spectral)
    entries = 2 if model.bottleneck.reads == "shared" else 1
    within, _ = inside(model, Seat())
    ffn = [*mlp(within, tokens), norm(model, i)]
    return [
        *[linear(e, i, bias, tokens, gains), norm(model, i)] * entries,
        *ffn * (model.bottleneck.ffns - 1),
        linear(i, e, bias, tokens, gains),
        norm(model, e),
        Cost(e if model.layer_scale else 0),
    ]


class FeedForward(nn.Module):
    """norm(x + MLP(x)): one of the feed-forward layers before the block's last."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.mlp = MLP(model)
        self.mlp_norm = build_norm(model)

    def forward(self, x_BSI: Tensor) -> Tensor:
        normed: Tensor = summed(self.mlp_norm, x_BSI, self.mlp(x_BSI)).normed
        return normed


class Entered(NamedTuple):
    """What a block begins with.

    Attributes:
        stream_BSI: to which attention and feed-forward layers add.
        inputs: what attention makes queries and keys of, and values too if `others` has nothing for them.
        others: `values_BME`, what values are made of.
    """

    stream_BSI: Tensor
    inputs: Tensor
    others: dict[str, Tensor]


class Bottleneck(nn.Module):
    """Linear layers with norms into a block and out of it, and its feed-forward layers before the last."""

    def __init__(self, model: config.Model, depth: float) -> None:
        """
        Args:
            model: the shape, outside.
            depth: chance that what the block adds is left out for a sample.
        """
        super().__init__()
        width, (within, _) = model.inner_width, inside(model, Seat())
        self.reads = model.bottleneck.reads
        self.entry = build_linear(model, model.hidden, width)
        self.entry_norm = build_norm(model, width)
        if self.reads == "shared":
            self.shared = build_linear(model, model.hidden, width)
            self.shared_norm = build_norm(model, width)
        self.ffns = nn.ModuleList(FeedForward(within) for _ in range(model.bottleneck.ffns - 1))
        self.exit = build_linear(model, width, model.hidden)
        self.exit_norm = build_norm(model)
        self.dropout = Dropout(model.dropout)
        self.depth = StochasticDepth(depth) if depth else None
        scaled = model.layer_scale is not None
        self.exit_scale = nn.Parameter(torch.empty(model.hidden)) if scaled else None

    def enter(self, x_BSE: Tensor) -> Entered:
        """From the residual stream into the block."""
        given = narrowed(x_BSE)
        stream_BSI = self.entry_norm(self.entry(given).to(x_BSE.dtype))
        if self.reads == "shared":
            return Entered(stream_BSI, self.shared_norm(self.shared(given)), {"values_BME": given})
        return Entered(stream_BSI, given if self.reads == "outside" else stream_BSI, {})

    def leave(self, stream_BSI: Tensor, x_BSE: Tensor, noise: Noise | None) -> Tensor:
        """The residual stream with what the block adds to it, normed: [B, S, E]."""
        added = self.exit(narrowed(stream_BSI))
        if self.exit_scale is not None:
            added = added * self.exit_scale
        added = self.dropout(added, noise)
        if self.depth is not None:
            added = self.depth(added, noise)
        normed: Tensor = self.exit_norm(x_BSE + added)
        return normed
