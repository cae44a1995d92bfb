"""What parts of a model cost: parameters and FLOPs, as data that adds up."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from headway.pretrain.config import Model
from headway.pretrain.models.seat import Seat


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
    biased = 1 + model.bias
    vectors = {"layernorm": biased, "rmsnorm": 1, "affine": biased, "none": 0}[model.norm]
    return Cost(vectors * width)


def projections(model: Model, queries: int, keys: int, seat: Seat = Seat()) -> list[Cost]:
    """q, k, v and o, with QK-norm's gains."""
    e, wide, narrow = model.hidden, model.heads * model.head_width, model.kv * model.head_width
    i, v = seat.inputs or e, seat.values or e
    shapes = [(i, wide, queries), (i, narrow, keys), (v, narrow, keys), (wide, e, queries)]
    gains = Cost(2 * model.head_width if model.attention.qk_norm else 0)
    return [*(linear(i, o, model.bias, n, int(model.spectral)) for i, o, n in shapes), gains]


def mlp(model: Model, tokens: float, width: int | None = None) -> list[Cost]:
    """A feed-forward layer, of the model's width if not given."""
    e, f = model.hidden, width or model.ffn_width
    shapes = [*[(e, f)] * (1 + model.gated), (f, e)]
    return [linear(i, o, model.bias, tokens, int(model.spectral)) for i, o in shapes]
