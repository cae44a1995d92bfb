"""A teacher's tap: it shows what its layer is asked for.

Shapes: B batch, S sequence, H heads, D their width, E hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import torch
from torch import Tensor

from headway.kernels.attention.dense import per_query_head
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias
from headway.pretrain.models.attention import Shown
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.routing import Side
from headway.pretrain.models.taps import Tap, Taught, set_tap
from headway.pretrain.models.transformer import Stack
from headway.pretrain.objectives.base import Objective
from headway.pretrain.objectives.distill.names import Target

SHOWN = "shown."


class Show(Tap):
    """Tensors of a layer, under `shown.` and what they are. `asked` may change from forward to forward."""

    def __init__(self, asked: Collection[tuple[str, bool]] = ()) -> None:
        """
        Args:
            asked: (what, whether of cross-attention); see `Target`.
        """
        super().__init__()
        self.asked = frozenset(asked)

    def attention(self, shown: Shown, taught: Taught, across: bool = False) -> Side:
        """Queries are scaled so that scores are q k^T / sqrt(D)."""
        side: Side = {}
        prefix = SHOWN + ("across_" if across else "")
        if ("q", across) in self.asked:
            side[f"{prefix}q"] = (shown.q_BHSD * _factor(shown)).transpose(1, 2)
        for what, x in (
            ("k", per_query_head(shown.k_BKMD, shown.q_BHSD)),
            ("queries", shown.q_BHSD),
            ("keys", shown.k_BKMD),
            ("values", shown.v_BKMD),
        ):
            if (what, across) in self.asked:
                side[f"{prefix}{what}"] = x.transpose(1, 2)
        if ("bias", across) in self.asked and shown.bias_HSM is not None:
            side[f"{prefix}bias"] = by_distance(shown.bias_HSM).expand(len(shown.q_BHSD), -1, -1)
        return side

    def states(self, before_BSE: Tensor, after_BSE: Tensor, mask: Mask, taught: Taught) -> Side:
        pairs = (("inputs", before_BSE), ("states", after_BSE))
        return {SHOWN + what: x for what, x in pairs if (what, False) in self.asked}


def _factor(shown: Shown) -> float:
    factor = shown.scale * math.sqrt(shown.q_BHSD.shape[-1])
    return 1.0 if math.isclose(factor, 1.0, rel_tol=1e-9) else factor


def by_distance(bias_HSS: Bias) -> Tensor:
    """A bias of scores that depends on key's place minus query's alone, by that distance from 1 - S to S - 1: [1, 2 S
    - 1, H]. All biases of models are of this kind (relative, ALiBi)."""
    block = bias_HSS if isinstance(bias_HSS, Tensor) else bias_HSS.block()
    last_row, first_row = block[:, -1], block[:, 0]
    return torch.cat((last_row[:, :-1], first_row), -1).T.unsqueeze(0)


def install(teacher: Objective) -> None:
    """Give all blocks of a teacher a tap that shows nothing yet."""
    for stack in (module for module in teacher.modules() if isinstance(module, Stack)):
        for block in stack:
            set_tap(block, Show())


def ask(teacher: Objective, wanted: Collection[Target]) -> None:
    """Say what the teacher's next forward shows."""
    for tower, name in enumerate(teacher.towers):
        stack = teacher.get_submodule(f"{name}.blocks")
        assert isinstance(stack, Stack)
        for number, block in enumerate(stack):
            asked = {
                (t.what, t.across) for t in wanted if t.tower == tower and t.layer // stack.repeats == number
            }
            tap = block.tap
            assert isinstance(tap, Show)
            tap.asked = frozenset(asked)


def collect(tower: int, hidden: Hidden, wanted: Collection[Target]) -> dict[str, Tensor]:
    """What a tower has shown, by the targets' names; a bias that is not there is left out."""
    found = {}
    for target in wanted:
        side = hidden.sides[target.layer] if target.tower == tower else {}
        key = SHOWN + ("across_" if target.across else "") + target.what
        if key in side:
            found[target.name] = side[key]
    return found
