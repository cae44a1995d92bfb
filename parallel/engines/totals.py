"""Sums of a loss's terms and metrics over micro-batches, then over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headway.parallel.mesh import PARTS, World
from headway.pretrain.objectives import LossOutput, Mean

if TYPE_CHECKING:
    from headway.parallel.engines.base import Stages


class Totals:
    """Sums of a loss's terms and metrics over micro-batches, then over ranks, with one copy from the device.

    Along the axes of PARTS every rank has its share of each sum; along the others they have the same.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.terms: dict[str, Tensor] = {}
        self.metrics: dict[str, Mean] = {}

    def add(self, out: LossOutput) -> None:
        for name, total in out.terms.items():
            total = total.detach()
            self.terms[name] = self.terms[name] + total if name in self.terms else total
        for name, (total, count) in out.metrics.items():
            known = self.metrics.get(name)
            self.metrics[name] = Mean(known.sum + total, known.over + count) if known else Mean(total, count)

    def add_told(self, pipeline: Stages, kind: str, found: list[LossOutput]) -> None:
        """Add what the last stage has found, which other stages are told."""
        for out in found:
            self.add(out)
        self.terms, self.metrics = pipeline.tell(kind, self.terms, self.metrics)

    def over_ranks(self) -> tuple[dict[str, float], dict[str, tuple[Tensor, float]]]:
        """Sums of the terms; sum (a tensor on CPU) and count of each metric."""
        pieces = [*self.terms.values(), *(piece for mean in self.metrics.values() for piece in mean)]
        flat = torch.cat([piece.detach().reshape(-1).double() for piece in pieces])
        reduced = torch.tensor(self.world.sum(*flat.tolist(), along=PARTS), dtype=torch.float64)
        whole = [
            part.reshape(piece.shape)
            for part, piece in zip(reduced.split([p.numel() for p in pieces]), pieces, strict=True)
        ]
        terms = {name: float(part) for name, part in zip(self.terms, whole, strict=False)}
        rest = iter(whole[len(terms) :])
        return terms, {name: (next(rest), float(next(rest))) for name in self.metrics}
