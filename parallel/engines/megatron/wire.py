"""Messages between the stages of a pipeline in the form that Megatron's schedules send: one tensor of one size.

Whatever travels is laid bit by bit into a flat tensor of words, behind a header that says which boundary and which
micro-batch it is for. Ranks that send in one order and receive in another, as Megatron's interleaved schedule does
with some settings, would otherwise take one message for another, all being of one size, and no error would be seen.

Shapes: N words of a message.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from headway.pretrain.errors import HeadwayError

WORD = torch.bfloat16
"""What messages are made of: Megatron wants floating-point numbers. They are moved, never computed with."""
ALIGN = 4
"""Words in the largest element, fp64: every piece begins at a multiple of it."""


class OrderError(HeadwayError):
    """A stage was given the message of another micro-batch, or of another stage."""


@dataclass
class Ledger:
    """Headers of the messages of a step as they came, and as they should have; compared at its end, for a GPU waits
    where one is looked at."""

    wanted: list[tuple[int, int]] = field(default_factory=list)
    came: list[Tensor] = field(default_factory=list)

    def note(self, message: Tensor, boundary: int, micro: int) -> None:
        self.wanted.append((boundary, micro))
        self.came.append(_header(message).clone())

    def check(self) -> None:
        """Raise OrderError if a message was not what it was taken for. Then all is forgotten."""
        wanted, came = self.wanted, [tuple(c) for c in torch.stack(self.came).tolist()] if self.came else []
        self.wanted, self.came = [], []
        for (boundary, micro), other in zip(wanted, came, strict=True):
            if (boundary, micro) != other:
                raise OrderError(
                    f"stage boundary {boundary} was to pass on micro-batch {micro} "
                    f"({'activations' if boundary > 0 else 'gradients'}), and was given {other}: "
                    "the schedule sends and receives in different orders, and gradients are wrong. Nothing was "
                    "updated and the last checkpoint stands: go on from it with parallel.engine = native"
                )


@dataclass(frozen=True)
class Wire:
    """What passes one boundary, always alike.

    Attributes:
        boundary: number of the stage behind it.
        pieces: shape and dtype of each tensor.
    """

    boundary: int
    pieces: tuple[tuple[tuple[int, ...], torch.dtype], ...]

    @classmethod
    def of(cls, boundary: int, examples: Sequence[Tensor]) -> Wire:
        return cls(boundary, tuple((tuple(t.shape), t.dtype) for t in examples))

    @property
    def words(self) -> int:
        """Words that a message takes at least."""
        return ALIGN + sum(_room(shape, dtype) for shape, dtype in self.pieces)

    def write(self, tensors: Sequence[Tensor], words: int, boundary: int, micro: int) -> Tensor:
        """A message [N, 1, 1] of so many words."""
        message_N = tensors[0].new_empty(words, dtype=WORD)
        header = _header(message_N)
        header[0], header[1] = boundary, micro
        for place, tensor in zip(self._places(message_N), tensors, strict=True):
            place.copy_(tensor)
        return message_N.view(words, 1, 1)

    def read(self, message_N: Tensor) -> list[Tensor]:
        """Copies of the tensors in a message."""
        return [place.clone() for place in self._places(message_N.view(-1))]

    def _places(self, message_N: Tensor) -> list[Tensor]:
        places, at = [], ALIGN
        for shape, dtype in self.pieces:
            words = math.prod(shape) * dtype.itemsize // WORD.itemsize
            places.append(message_N[at : at + words].view(dtype).view(shape))
            at += _room(shape, dtype)
        return places


class Send(torch.autograd.Function):
    """Tensors -> message; its gradient is a message of the tensors' gradients."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, words: int, micro: int, ledger: Ledger, *tensors: Tensor) -> Tensor:
        ctx.told = wire, micro, ledger
        return wire.write(tensors, words, wire.boundary, micro)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        wire, micro, ledger = ctx.told
        ledger.note(gradients[0], -wire.boundary, micro)
        return None, None, None, None, *wire.read(gradients[0])


class Receive(torch.autograd.Function):
    """Message -> tensors. All take a gradient, wanted or not, so that something goes back: the other side waits."""

    @staticmethod
    def forward(ctx: Any, wire: Wire, micro: int, ledger: Ledger, message: Tensor) -> tuple[Tensor, ...]:
        ctx.told = wire, micro, len(message)
        ledger.note(message, wire.boundary, micro)
        return tuple(wire.read(message))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        wire, micro, words = ctx.told
        return None, None, None, wire.write(gradients, words, -wire.boundary, micro)


def _header(message: Tensor) -> Tensor:
    return message.view(-1)[:ALIGN].view(torch.int32)


def _room(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    words = math.prod(shape) * dtype.itemsize // WORD.itemsize
    return -(-words // ALIGN) * ALIGN
