"""Taps: what a block shows of its insides, to a teacher's recorder or to a loss that compares it with a teacher's.

A block without a tap shows nothing and costs nothing. What a tap finds is a part of what the block gives beside, so it
goes wherever that goes: through recomputation, compiled graphs and the stages of a pipeline.

Shapes: B batch, S sequence, E hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.pretrain.models.attention import Attention, Shown
from headway.pretrain.models.routing import Side

Taught = Mapping[str, Tensor]
"""What a teacher gave for the rows at hand, by name; see `headway.pretrain.objectives.distill.names`."""


class Tap(nn.Module):
    """Base: shows nothing."""

    def attention(self, shown: Shown, taught: Taught, across: bool = False) -> Side:
        """Of attention; `across`: of cross-attention."""
        return {}

    def states(self, before_BSE: Tensor, after_BSE: Tensor, mask: Mask, taught: Taught) -> Side:
        """Of the residual stream before and after the block; the mask is that of self-attention."""
        return {}


def attentions(block: nn.Module) -> Iterator[tuple[Attention, bool]]:
    """A block's attention layers that can show what they compute with, and whether each is cross-attention."""
    for name, across in (("attention", False), ("cross", True)):
        layer = getattr(block, name, None)
        if isinstance(layer, Attention):
            yield layer, across


def set_tap(block: nn.Module, tap: Tap) -> None:
    """Give a block a tap."""
    block.tap = tap
    for layer, _ in attentions(block):
        layer.shows = True
