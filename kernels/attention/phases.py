"""Phases of a scope: parts that share no pair, each computed alone, in a form that suits it, and merged by its
log-sum-exp (Milakov and Gimelshein 2018).

Places that are far apart and see each other are brought together: as rows of the batch (`Fold`), or by taking the keys
that are seen alone (`Picked`).

Shapes: B batch, H heads, Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Comb, Dilated, Ends, OtherBlocks, Scope, Window

FILLING = -2
"""Document of what fills up."""


class Move:
    """How operands come together for a phase: not at all, and the base of the others.

    Attributes:
        apart: whether they are others than the whole's.
    """

    apart = False

    def rows(self, x: Tensor, fill: float = 0) -> Tensor:
        """What belongs to queries, [B, H, Q, ...]; `fill` is what fills up."""
        return x

    def keys(self, x: Tensor) -> Tensor:
        """What belongs to keys, [B, H, S, ...]."""
        return x

    def back(self, x: Tensor) -> Tensor:
        """What belongs to queries, as it was."""
        return x

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add what belongs to keys to the whole's."""
        total += x

    def mask(self, mask: Mask, phase: Scope | None, q: Tensor) -> Mask:
        """The phase's."""
        return mask._replace(scope=phase)


@dataclass(frozen=True)
class Fold(Move):
    """Places multiples of `stride` apart as rows of the batch: [B, H, S, ...] -> [B stride, H, S / stride, ...],
    filled up at the end."""

    apart = True
    stride: int
    length: int
    scope: Scope

    def rows(self, x: Tensor, fill: float = 0) -> Tensor:
        lacking = -self.length % self.stride
        if lacking:
            shape = list(x.shape)
            shape[2] = lacking
            x = torch.cat((x, x.new_full(shape, fill)), 2)
        x = x.unflatten(2, (-1, self.stride)).movedim(3, 1)
        return x.flatten(0, 1)

    def keys(self, x: Tensor) -> Tensor:
        return self.rows(x)

    def back(self, x: Tensor) -> Tensor:
        x = x.unflatten(0, (-1, self.stride)).movedim(1, 3)
        return x.flatten(2, 3)[:, :, : self.length]

    def add(self, total: Tensor, x: Tensor) -> None:
        total += self.back(x)

    def mask(self, mask: Mask, phase: Scope | None, q: Tensor) -> Mask:
        """What fills up is a document of its own."""
        documents = mask.documents
        if documents is None and self.length % self.stride:
            documents = torch.zeros(len(q), self.length, dtype=torch.int32, device=q.device)
        if documents is not None:
            documents = self.rows(documents[:, None], FILLING)[:, 0]
        return Mask(mask.causal, documents, scope=self.scope)


@dataclass(frozen=True)
class Picked(Move):
    """Some keys alone."""

    apart = True
    places: Tensor
    scope: Scope

    def keys(self, x: Tensor) -> Tensor:
        return x[:, :, self.places]

    def add(self, total: Tensor, x: Tensor) -> None:
        total[:, :, self.places] += x

    def mask(self, mask: Mask, phase: Scope | None, q: Tensor) -> Mask:
        """Causality is the scope's: places of keys are no longer their numbers."""
        documents = mask.documents
        theirs = None if documents is None else documents[:, self.places]
        return Mask(False, documents, theirs, scope=self.scope)


def phases(mask: Mask, length: int, near: bool, least: int) -> list[tuple[Scope | None, Move]]:
    """What is computed alone and merged, and how operands come together for it.

    Args:
        mask: of the whole.
        length: of the sequence.
        near: whether what is dropped or added goes by places, so that all stay where they are.
        least: rows of the batch from which a fold pays.
    """
    if mask.scope is None:
        return [(None, Move())]
    return [(phase, Move() if near else _move(phase, mask, length, least)) for phase in mask.scope.phases()]


def _move(phase: Scope, mask: Mask, length: int, least: int) -> Move:
    if isinstance(phase, Ends) and len(places := phase.places(length)):
        return Picked(places, OtherBlocks(phase.stride, phase.summaries, mask.causal))
    if isinstance(phase, Comb) and phase.stride >= least:
        return Fold(phase.stride, length, Comb(1))
    if isinstance(phase, Dilated) and phase.dilation >= least:
        return Fold(phase.dilation, length, Window(phase.width))
    return Move()
