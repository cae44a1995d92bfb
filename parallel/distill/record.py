"""What goes into a cache: all that any step wants of a teacher, in whole rows.

Ranks that write have whole rows: their layout has data axes alone, the teacher's is its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.parallel.distill.holdings import Holding
from headway.parallel.distill.student import MAPS, Rows, Seats
from headway.pretrain.data.teacher_cache import Field
from headway.pretrain.objectives.distill import names
from headway.pretrain.objectives.distill.distillation import Distillation, Wanted
from headway.pretrain.objectives.distill.names import Target

EXACT = (names.LOGITS, names.REST, names.OTHERS)
"""Stored in fp32 at least. The log-sum-exp of a row of logits is that of these logits: rounded apart, the share of
all other words could fall below 0."""


class Shelves(Seats):
    """Ranks that keep what a teacher gives: of their own rows, with all of the teacher's heads, whichever a student's
    heads learn from."""

    def of_rows(self, rank: int, rows: Rows, every: bool) -> Holding:
        return super().of_rows(rank, rows, every=False)

    def _heads(self, target: Target, rank: int) -> tuple[tuple[int, ...], ...]:
        if target.what in MAPS:
            return (tuple(range(self.teacher.heads)),)
        return super()._heads(target, rank)


def everything(distillation: Distillation) -> Wanted:
    """All that any step wants."""
    return distillation.wanted(None)._replace(others=distillation.contrast is not None)


def names_of(wanted: Wanted) -> list[str]:
    """Names in a batch of what is wanted."""
    found = [target.name for target in wanted.targets]
    found += [names.FINAL] if wanted.final else []
    found += [names.LAST] if wanted.last else []
    found += [names.LOGITS] if wanted.classes else []
    found += [names.LOGITS, names.WORDS, names.REST] if wanted.top else []
    return found + ([names.OTHERS] if wanted.others else [])


def fields_of(found: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Field]:
    """How a cache stores what a teacher gave.

    Args:
        found: name -> [rows, ...].
        dtype: of features: queries, keys, values, hidden states. Logits, log-sum-exps, representations and biases of
            scores, which are small, have fp32 at least; words' numbers are int32.
    """

    def kept(name: str, x: Tensor) -> torch.dtype:
        if not x.is_floating_point():
            return torch.int32
        exact = name in EXACT or name.endswith(".bias")
        return torch.promote_types(dtype, torch.float32) if exact else dtype

    return {name: Field(kept(name, x), tuple(x.shape[1:])) for name, x in found.items()}
