"""How far roundings may carry what a kernel computes, where no sum of absolute values bounds it closely."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8}


def bounds(
    reference: Callable[[Sequence[Tensor]], Sequence[Tensor]],
    operands: Sequence[Tensor],
    wanted: Sequence[Tensor],
    dtype: torch.dtype,
    draw: torch.Generator,
) -> list[float]:
    """Of each output of a reference in fp64: how much it changes where every operand is rounded once more, at random.

    Eight times that, for what is rounded one after another (operands of products, states, what is written to memory
    and, in fp32, sums, whose roundings are taken for four), and as many roundings of the largest number of the result.
    """
    unit = ROUNDING[dtype] * (1 if dtype == torch.bfloat16 else 4)
    moved = [
        x.double() * (1 + unit * (2 * torch.rand(x.shape, generator=draw).double() - 1)) for x in operands
    ]
    pairs = zip(reference(moved), wanted, strict=True)
    return [8 * float((x - y).detach().abs().max() + unit * y.detach().abs().max()) for x, y in pairs]
