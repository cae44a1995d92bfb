"""What parts of a model cost: parameters and FLOPs, as data that adds up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from headway.pretrain.config import Model


class Cost(NamedTuple):
    """What a part of a model costs.

    Attributes:
        parameters: numbers that are trained.
        flops: of a forward of one row.
        idle: those of `parameters` that a token does not meet: experts that are not its own.
    """

    parameters: int = 0
    flops: float = 0.0
    idle: int = 0


def total(costs: Iterable[Cost]) -> Cost:
    parameters, flops, idle = map(sum, zip(*costs, strict=True))
    return Cost(int(parameters), float(flops), int(idle))


def linear(inputs: int, outputs: int, bias: bool, tokens: float, gains: int = 0) -> Cost:
    """A linear layer on so many tokens of a row."""
    return Cost(inputs * outputs + outputs * bias + gains, 2 * inputs * outputs * tokens)


def norm(model: Model, width: int) -> Cost:
    vectors = {"layernorm": 1 + model.bias, "rmsnorm": 1, "none": 0}[model.norm]
    return Cost(vectors * width)
