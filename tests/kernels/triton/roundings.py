"""How far roundings may carry what a kernel computes, where no sum of absolute values bounds it closely."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}
DRAWS = 8
"""So many that none, of a result that is one number, would be seldom: the largest is taken."""


class Roundings:
    """Roundings of numbers, drawn at random: each changes one by up to a unit.

    Where that is of fp32, by up to (terms / 3)^0.5 units: the error of a sum of so many terms, one after another, whose
    roundings are independent (Higham and Mary 2019).

    Attributes:
        unit: of the dtype that is rounded to.
        single: of sums in fp32.
    """

    def __init__(self, dtype: torch.dtype, terms: int, draw: torch.Generator | None) -> None:
        self.single = ROUNDING[torch.float32] * max(1.0, terms / 3) ** 0.5
        self.unit = self.single if dtype == torch.float32 else ROUNDING[dtype]
        self.draw = draw

    def __call__(self, x: Tensor) -> Tensor:
        """Rounded to the dtype; so is the gradient, anew."""
        moved: Tensor = _Moved.apply(x, lambda y: y + self._drawn(y) * self.unit)
        return moved

    def sums(self, x: Tensor) -> Tensor:
        """Of sums in fp32, by how much they are off."""
        return self._drawn(x) * self.single

    def _drawn(self, x: Tensor) -> Tensor:
        if self.draw is None:
            return torch.zeros_like(x)
        return x * (2 * torch.rand(x.shape, generator=self.draw).double() - 1)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.move = move
        return move(x)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.move(d), None


def bounds(
    stages: Callable[[Roundings, Sequence[Tensor]], Sequence[Tensor]],
    operands: Sequence[Tensor],
    dtype: torch.dtype,
    terms: int,
    draw: torch.Generator,
) -> list[float]:
    """How far results may be from what they must be: twice as far as the farthest where roundings are drawn.

    Args:
        stages: (roundings, operands in fp64) -> results in fp64, each number rounded where a kernel rounds it.
        operands: kernels scale them before they multiply, so they are rounded, too; what is narrower than `dtype` or
            wider is not.
        terms: of the longest sum.
    """
    wide = [x.detach().double() for x in operands]
    wanted = stages(Roundings(dtype, terms, None), wide)
    farthest = [0.0] * len(wanted)
    for _ in range(DRAWS):
        drawn = Roundings(dtype, terms, draw)
        given = [drawn(y) if x.dtype == dtype else y for x, y in zip(operands, wide, strict=True)]
        apart = [
            float((x - y).detach().abs().max()) for x, y in zip(stages(drawn, given), wanted, strict=True)
        ]
        farthest = [max(pair) for pair in zip(farthest, apart, strict=True)]
    return [2 * x for x in farthest]
