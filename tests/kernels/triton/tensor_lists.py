"""Lists of tensors that an optimizer's kernels are proved on, and what their launches cost.

Tensors are reached by address, so that a launch does not tell what it moves: the table's sizes do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SHAPES = ((67,), (40, 80), (), (1,), (2048,), (0,), (3, 5, 7), (4099,))
"""One block and a part, parts, a whole one, one number, none."""
STEPS = (1, 2, 7, 1000, 3, 100_000, 5, 1)
"""Which step it is of each of SHAPES."""


class Drawn(NamedTuple):
    """Weights, gradients and moments of SHAPES, on the CPU."""

    params: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    state_steps: list[Tensor]

    def on(self, device: torch.device) -> dict[str, list[Tensor]]:
        """Copies, by an optimizer's names."""
        return {name: [x.clone().to(device) for x in tensors] for name, tensors in self._asdict().items()}


def drawn_lists(param: torch.dtype, grad: torch.dtype, moment: torch.dtype, scale: float = 1.0) -> Drawn:
    """Numbers as in training: gradients of `scale`, moments of its size."""
    draw = torch.Generator().manual_seed(seed())

    def tensors(dtype: torch.dtype, size: float, square: bool = False) -> list[Tensor]:
        found = []
        for shape in SHAPES:
            x = torch.randn(shape, generator=draw) * size
            found.append((x * x if square else x).to(dtype))
        return found

    return Drawn(
        tensors(param, 0.5),
        tensors(grad, scale),
        tensors(moment, 0.3 * scale),
        tensors(moment, scale, square=True),
        [torch.tensor(float(t)) for t in STEPS],
    )


def shifted(x: Tensor) -> Tensor:
    """A copy at an address that no wide load may have."""
    room = x.new_empty(x.numel() + 1)
    return room[1:].view(x.shape).copy_(x)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all."""
    return torch.cat([x.reshape(-1) for x in tensors])


def elements(launch: Launch) -> int:
    """Of all tensors in a launch's table."""
    rows = launch.arguments["rows"]
    return launch.programs * launch.arguments["N"] if rows.is_meta else int(rows[:, -2].sum())


def itemsize(dtype: Any) -> int:
    """Bytes of a number of a dtype of Triton; 0 without one."""
    return 0 if dtype is None else int(dtype.primitive_bitwidth) // 8
