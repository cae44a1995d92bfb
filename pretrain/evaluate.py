"""Held-out loss and metrics: every held-out sample is scored exactly once, at any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from headway.pretrain.data.samples import Rows, Samples, make_keys
from headway.pretrain.engine import Batch, Engine, Sums


@dataclass
class Evaluator:
    """Scores held-out samples in rounds; in a round every rank scores `rows_per_round` rows of its own.

    What is random about a held-out sample (masks, partners) is the same in every evaluation of every run.

    Attributes:
        samples: the held-out samples of each source.
        collate: the objective's shaping of rows into a batch.
        data_rank, data_ranks: which rows of a round are this rank's.
    """

    engine: Engine
    samples: Sequence[Samples]
    collate: Callable[[Rows], Batch]
    device: torch.device
    data_rank: int = 0
    data_ranks: int = 1
    rows_per_round: int = 16

    def sums(self, limit: int | None = None) -> Sums:
        """Sums and counts of the loss and the objective's metrics; of all samples, or `limit` evenly spaced ones."""
        found: Sums = {}
        for samples in self.samples:
            chosen = np.arange(len(samples))
            if limit is not None and limit < len(samples):
                chosen = np.linspace(0, len(samples) - 1, limit).astype(np.int64)
            for first in range(0, len(chosen), self.rows_per_round * self.data_ranks):
                round_ = chosen[first : first + self.rows_per_round * self.data_ranks]
                for name, (total, count) in self.engine.evaluate(self._mine(samples, round_)).items():
                    known = found.get(name, (0.0, 0.0))
                    found[name] = known[0] + total, known[1] + count
        return found

    def _mine(self, samples: Samples, round_: np.ndarray) -> Batch:
        """This rank's rows; where there are too few, rows in which nothing is scored fill up."""
        mine = round_[self.data_rank :: self.data_ranks]
        missing = self.rows_per_round - len(mine)
        rows = heldout_rows(samples, np.concatenate([mine, np.repeat(round_[:1], missing)]))
        rows.setdefault("scored", np.ones(self.rows_per_round, dtype=bool))[len(mine) :] = False
        return {key: value.to(self.device) for key, value in self.collate(rows).items()}


def heldout_rows(samples: Samples, indices: np.ndarray) -> Rows:
    """Held-out samples with their keys, which depend on the number alone."""
    keys = make_keys("held-out", 0, indices.tolist(), [0] * len(indices))
    return {**samples.rows(indices, keys), "sample": indices, "key": keys}


def bits_per_byte(nats: float, utf8_bytes: int) -> float:
    """Summed loss in nats over the bytes of the same text."""
    return nats / math.log(2) / utf8_bytes
