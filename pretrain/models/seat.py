"""Where a layer sits in its model, as far as its shape depends on it."""

from __future__ import annotations

from typing import NamedTuple


class Seat(NamedTuple):
    """Attributes:
    layer: place among the blocks of its stack, from 0.
    causal: whether a token sees earlier ones only.
    cross: whether it looks at an encoder's output.
    tokens: of the longest row that its tower reads; 0 if nothing depends on it.
    inputs: width of what queries and keys are made of; 0 for the model's `hidden`.
    values: width of what values are made of; 0 for the model's `hidden`.
    """

    layer: int = 0
    causal: bool = False
    cross: bool = False
    tokens: int = 0
    inputs: int = 0
    values: int = 0
