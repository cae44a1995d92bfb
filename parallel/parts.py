"""Parts of whole parameters, as plain tensors: how engines without DTensor hold what is cut over ranks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

MARKS = ("part", "tensor_share")
"""Attributes of parameters: which part of a whole they are; whether the gradient of a whole one is a share, to be
summed over the tensor axis."""


class Part(NamedTuple):
    """Which part of a whole a tensor is.

    Attributes:
        shape: of the whole.
        offset: where the part begins in it, one number a dim.
    """

    shape: tuple[int, ...]
    offset: tuple[int, ...]


def mark(parameter: nn.Parameter, part: Part) -> nn.Parameter:
    """Say that a parameter is a part."""
    parameter.part = part  # type: ignore[attr-defined]
    return parameter


def part_of(tensor: Tensor) -> Part:
    """What part a tensor is; a whole one if nothing is said."""
    part: Part | None = getattr(tensor, "part", None)
    return part or Part(tuple(tensor.shape), (0,) * tensor.dim())


def is_part(tensor: Tensor) -> bool:
    """Whether other ranks hold other parts of the same parameter."""
    return part_of(tensor).shape != tuple(tensor.shape)
