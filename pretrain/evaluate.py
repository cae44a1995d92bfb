"""Held-out loss and bits per byte: every held-out token is scored exactly once, at any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headway.pretrain.data.heldout import HeldoutRows
from headway.pretrain.data.stream import Rows
from headway.pretrain.engine import Batch, Engine


@dataclass
class Evaluator:
    """Scores held-out rows in rounds; in a round every rank scores `rows_per_round` rows of its own.

    Attributes:
        stores: the held-out rows of each source.
        collate: the objective's shaping of rows into a batch.
        data_rank, data_ranks: which rows of a round are this rank's.
    """

    engine: Engine
    stores: Sequence[HeldoutRows]
    collate: Callable[[Rows], Batch]
    device: torch.device
    data_rank: int = 0
    data_ranks: int = 1
    rows_per_round: int = 16

    def loss(self, limit: int | None = None) -> tuple[float, int]:
        """Summed loss in nats and number of scored tokens; of all rows, or `limit` evenly spaced ones."""
        total, tokens = 0.0, 0
        for store in self.stores:
            count = len(store)
            chosen = np.arange(count)
            if limit is not None and limit < count:
                chosen = np.linspace(0, count - 1, limit).astype(np.int64)
            for first in range(0, len(chosen), self.rows_per_round * self.data_ranks):
                round_ = chosen[first : first + self.rows_per_round * self.data_ranks]
                loss, scored = self.engine.evaluate(self._mine(store, round_))
                total, tokens = total + loss, tokens + scored
        return total, tokens

    def _mine(self, store: HeldoutRows, round_: np.ndarray) -> Batch:
        """This rank's rows; where there are too few, rows in which nothing is scored fill up."""
        mine = round_[self.data_rank :: self.data_ranks]
        missing = self.rows_per_round - len(mine)
        rows = store.rows(np.concatenate([mine, np.repeat(round_[:1], missing)]))
        rows["scored"][len(mine) :] = False
        return {key: value.to(self.device) for key, value in self.collate(rows).items()}


def bits_per_byte(nats: float, utf8_bytes: int) -> float:
    """Summed loss in nats over the bytes of the same text."""
    return nats / math.log(2) / utf8_bytes
