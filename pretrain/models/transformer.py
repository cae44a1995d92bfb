"""The one transformer core: a block, a stack of blocks, and a tower: a stack with its positions and final norm.

Shapes: B batch, S sequence, M encoder's sequence, E hidden size, H query heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Attention, Beside
from headway.pretrain.models.bottleneck import Bottleneck, inside
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.layers import (
    MLP,
    Dropout,
    Noise,
    StochasticDepth,
    Summed,
    build_norm,
    summed,
)
from headway.pretrain.models.mixers import build_mixer
from headway.pretrain.models.moe import MoE
from headway.pretrain.models.positions import LinearBias, RelativeBias, RotaryPositions, stretch_of
from headway.pretrain.models.routing import Side
from headway.pretrain.models.seat import Seat
from headway.pretrain.models.taps import Tap, Taught


class Context(NamedTuple):
    """What every block of a forward is told.

    Attributes:
        mask: which keys a query sees.
        turn: rotary angles, or None.
        noise: what dropout depends on; None drops nothing.
        bias_HSS: added to the scores of self-attention, or None.
        memory_BME: the encoder's output, for decoders of an encoder-decoder.
        memory_mask: which of its places a query sees.
        outputs: how many places, from the first on, anything reads after this block; None for all.
        taught: what a teacher gave, for taps.
    """

    mask: Mask = Mask()
    turn: Rotation | None = None
    noise: Noise | None = None
    bias_HSS: Bias | None = None
    memory_BME: Tensor | None = None
    memory_mask: Mask = Mask(causal=False)
    outputs: int | None = None
    taught: Taught = MappingProxyType({})


class Block(nn.Module):
    """Attention, cross-attention in decoders, and a feed-forward layer or experts, each added to the residual stream.

    Pre-norm (Xiong et al. 2020): x + f(norm(x)). Post-norm (Vaswani et al. 2017): norm(x + f(x)). What is added goes
    through layer scale, dropout and stochastic depth, where the config has them.
    """

    def __init__(
        self,
        model: config.Model,
        seat: Seat = Seat(),
        layers: int | None = None,
        cross: bool = False,
    ) -> None:
        """
        Args:
            model: the shape.
            seat: this block's place among its stack's `layers`, and what its rows are.
            layers: of the stack; `model.layers` if not given.
            cross: whether it attends to an encoder.
        """
        super().__init__()
        self.pre = model.norm_position == "pre"
        depth = _depth(model, seat, layers)
        self.attention_norm = build_norm(model)
        self.attention = build_mixer(model, seat)
        self.attention_dropout = Dropout(model.dropout)
        if cross:
            self.cross_norm = build_norm(model)
            self.cross = Attention(model, seat._replace(cross=True, causal=False))
            self.cross_dropout = Dropout(model.dropout)
        self.mlp_norm = build_norm(model)
        self.mlp = MoE(model) if model.has_experts(seat.layer) else MLP(model)
        self.mlp_dropout = Dropout(model.dropout)
        self.depth = (
            nn.ModuleDict({name: StochasticDepth(depth) for name in ("attention", "mlp")}) if depth else None
        )
        scaled = model.layer_scale is not None
        self.attention_scale = nn.Parameter(torch.empty(model.hidden)) if scaled else None
        self.mlp_scale = nn.Parameter(torch.empty(model.hidden)) if scaled else None
        self.tap: Tap | None = None

    def forward(self, x_BSE: Tensor, context: Context) -> tuple[Tensor, Side]:
        """Returns [B, S, E] in the residual stream's dtype, and what the loss or the records want of this block.

        Where the context asks for fewer `outputs`, S is their number: every place is still a key and a value.
        """
        side: Side = {}
        inputs = self.attention_norm(x_BSE) if self.pre else x_BSE
        across = context.memory_BME is not None
        after = self.cross_norm if across else self.mlp_norm
        stream = self._attend(x_BSE, inputs, context, side, after)
        if across:
            stream = self._attend_to_encoder(stream, context, side, self.mlp_norm)
        return self._tapped(x_BSE, self._feed_forward(stream, context, side), context, side)

    def _tapped(self, before_BSE: Tensor, x_BSE: Tensor, context: Context, side: Side) -> tuple[Tensor, Side]:
        """What the block gives, when a tap has seen it."""
        if self.tap is not None:
            side.update(self.tap.states(before_BSE, x_BSE, context.mask, context.taught))
        return x_BSE, side

    def _attend(
        self,
        x_BSE: Tensor,
        inputs: Tensor,
        context: Context,
        side: Side,
        after: nn.Module,
        **others: Tensor,
    ) -> Summed:
        """What attention makes of the stream, and what the next sub-layer reads.

        Args:
            inputs: what attention reads; `others`: what it reads beside.
            after: the next sub-layer's norm, for pre-norm.
        """
        outputs = context.outputs
        given = inputs, context.mask, context.turn, context.noise, context.bias_HSS
        added, beside = self.attention(*given, queries=outputs, **others)
        x_BSE = x_BSE[:, :outputs]
        self._note(beside, context, side)
        span = self.attention.mean_span() if isinstance(self.attention, Attention) else None
        if span is not None:
            side["attention_span"] = span.expand(len(x_BSE))
        return self._joined("attention", x_BSE, added, context.noise, after)

    def _note(self, beside: Beside | None, context: Context, side: Side, across: bool = False) -> None:
        """Put what attention gives beside where the loss and the records find it."""
        if beside is None:
            return
        if beside.entropy_B is not None:
            side["attention_entropy"] = beside.entropy_B
        if beside.choice is not None:
            side["log_chosen"], side["baseline"] = beside.choice
        if beside.shown is not None and self.tap is not None:
            side.update(self.tap.attention(beside.shown, context.taught, across))

    def _attend_to_encoder(self, stream: Summed, context: Context, side: Side, after: nn.Module) -> Summed:
        mask, noise = context.memory_mask, context.noise
        added, beside = self.cross(stream.normed, mask, None, noise, memory_BME=context.memory_BME)
        self._note(beside, context, side, across=True)
        return self._joined("cross", stream.total, added, noise, after)

    def _feed_forward(self, stream: Summed, context: Context, side: Side) -> Tensor:
        """The stream after the feed-forward layer or experts."""
        if isinstance(self.mlp, MoE):
            documents, split = context.mask.documents, context.mask.split
            valid_BS = None if documents is None else documents >= 0
            added, routed = self.mlp(stream.normed, context.noise, valid_BS, split and split[0])
            side.update(routed)
        else:
            added = self.mlp(stream.normed)
        return self._joined("mlp", stream.total, added, context.noise, None).total

    def _joined(
        self, name: str, x_BSE: Tensor, added: Tensor, noise: Noise | None, after: nn.Module | None
    ) -> Summed:
        """The stream when a sub-layer's output was added, with layer scale, dropout and stochastic depth, and what the
        next sub-layer reads: of pre-norm what its norm `after` gives, of post-norm the normed stream itself."""
        scale, dropout = getattr(self, f"{name}_scale", None), getattr(self, f"{name}_dropout")
        if scale is not None:
            added = added * scale
        total: Tensor | None = None
        if self.depth is not None and name in self.depth:
            added = self.depth[name](dropout(added, noise), noise)
        elif dropout.drops(noise):
            total = dropout(added, noise, x_BSE)
        norm = after if self.pre else getattr(self, f"{name}_norm")
        if norm is None:
            return Summed.same(x_BSE + added if total is None else total)
        found = summed(norm, x_BSE, added) if total is None else summed(norm, total, None)
        return found if self.pre else Summed.same(found.normed)


class BottleneckBlock(Block):
    """A block that works at a width of its own (Sun et al. 2020): what it adds to the residual stream comes out of a
    bottleneck, in which attention and feed-forward layers add to what has come in. Post-norm."""

    def __init__(self, model: config.Model, seat: Seat = Seat(), layers: int | None = None) -> None:
        """Arguments as of `Block`."""
        super().__init__(*inside(model, seat), layers)
        self.bottleneck = Bottleneck(model, _depth(model, seat, layers))

    def forward(self, x_BSE: Tensor, context: Context) -> tuple[Tensor, Side]:
        side: Side = {}
        inner, inputs, others = self.bottleneck.enter(x_BSE)
        stream = self._attend(inner, inputs, context, side, self.mlp_norm, **others)
        for ffn in self.bottleneck.ffns:
            stream = Summed.same(ffn(stream.total))
        inner = self._feed_forward(stream, context, side)
        outside = self.bottleneck.leave(inner, x_BSE[:, : context.outputs], context.noise)
        return self._tapped(x_BSE, outside, context, side)


def build_block(model: config.Model, seat: Seat, layers: int, cross: bool = False) -> Block:
    """The block that the config names; arguments as of `Block`."""
    return (
        BottleneckBlock(model, seat, layers) if model.bottleneck.hidden else Block(model, seat, layers, cross)
    )


def _depth(model: config.Model, seat: Seat, layers: int | None) -> float:
    """Chance that a block is skipped: grows from 0 at the first block to the model's at the last."""
    return model.stochastic_depth * seat.layer / max(1, (layers or model.layers) - 1)


class Stack(nn.ModuleList):
    """Blocks in order, each used `repeats` times in a row; a slice of a stack is a stack.

    Attributes:
        span: first use of a block that is made here, and the one after the last, of a stack that is cut into stages;
            None makes all.
        uses: of the whole stack.
    """

    def __init__(self, blocks: Iterable[Block] = (), repeats: int = 1) -> None:
        super().__init__(blocks)
        self.repeats, self.uses = repeats, len(self) * repeats
        self.span: tuple[int, int] | None = None

    def __getitem__(self, index: Any) -> Any:
        part = super().__getitem__(index)
        return Stack(part, self.repeats) if isinstance(index, slice) else part

    def forward(self, x_BSE: Tensor, context: Context) -> tuple[Tensor, list[Side]]:
        """Returns [B, S, E], and what each block (each use of a block) gives beside."""
        sides = []
        for use in range(*(self.span or (0, self.uses))):
            number, time = divmod(use, self.repeats)
            block, noise = self._modules[str(number)], context.noise
            assert block is not None
            here = context if time == 0 or noise is None else context._replace(noise=noise.again(time))
            if use < self.uses - 1:
                here = here._replace(outputs=None)
            x_BSE, side = block(x_BSE, here)
            sides.append(side)
        return x_BSE, sides


class Tower(nn.Module):
    """A stack of blocks, the positions that its attention needs, and a final norm (pre-norm models only)."""

    def __init__(
        self,
        model: config.Model,
        *,
        causal: bool,
        layers: int | None = None,
        cross: bool = False,
        embed: nn.Module | None = None,
        tokens: int = 0,
    ) -> None:
        """
        Args:
            model: the shape.
            causal: whether a token sees earlier ones only.
            tokens: of the longest row that it reads, for mechanisms whose parameters depend on it.
            layers: uses of blocks; `model.layers` if not given.
            cross: whether blocks attend to an encoder.
            embed: what comes before the blocks, where the tower is a whole model.
        """
        super().__init__()
        if embed is not None:
            self.embed = embed
        self.causal = causal
        layers = layers or model.layers
        unique = min(layers, model.unique_layers or layers)
        stretch = stretch_of(model.rotary_scaling)
        turns = model.positions == "rotary"
        self.rotary = RotaryPositions(model.head_width, model.rotary_base, stretch) if turns else None
        self.slopes = LinearBias(model.heads) if model.positions == "alibi" else None
        buckets, distance = model.relative_buckets, model.relative_distance
        self.relative = (
            RelativeBias(model.heads, buckets, distance) if model.positions == "relative" else None
        )
        seats = (Seat(i, causal, tokens=tokens) for i in range(unique))
        blocks = (build_block(model, seat, unique, cross) for seat in seats)
        self.blocks = Stack(blocks, layers // unique)
        self.norm = build_norm(model) if model.norm_position == "pre" else nn.Identity()

    def run(
        self,
        x_BSE: Tensor,
        columns: Columns,
        mask: Mask,
        noise: Noise | None = None,
        memory_BME: Tensor | None = None,
        memory_mask: Mask | None = None,
        outputs: int | None = None,
        taught: Taught | None = None,
    ) -> tuple[Tensor, list[Side]]:
        """Blocks and final norm: [B, S, E], or of the first `outputs` places; and what the blocks give beside.

        Args:
            x_BSE: the columns that are here.
            columns: which they are.
            mask: of the whole sequence; `memory_mask` is of the whole of both.
            taught: what a teacher gave, for taps.
        """
        places_S, mask = columns.places_S, mask._replace(split=columns.split)
        noise = noise and noise.over(places_S)
        turn = None if self.rotary is None else self.rotary(places_S, x_BSE.dtype)
        bias: Bias | None = None
        if self.relative is not None:
            bias = self.relative(places_S, columns.all_S, not self.causal)
        elif self.slopes is not None:
            bias = self.slopes(places_S, columns.all_S, x_BSE.dtype)
        across = memory_mask or Mask(causal=False)
        context = Context(mask, turn, noise, bias, memory_BME, across, outputs, taught or {})
        x_BSE, sides = self.blocks(x_BSE, context)
        return self.norm(x_BSE), sides
