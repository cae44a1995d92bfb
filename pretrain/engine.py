"""The protocol between the training loop and the engines that spread a model.

The loop knows neither ranks nor meshes. It hands the engine this rank's rows of a global batch; the engine
splits them into micro-batches, runs them, reduces, clips and steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from headway.pretrain.data.used import Used

Batch = dict[str, Tensor]
"""Rows of samples: every tensor's first dim is the sample, so any slice of rows is a batch too.

Keys that every batch has: `sample` (int64, the sample's place in the global order, which names it) and
`slot` (int64, its place in the global batch). Batches of a run have `key` (int64, a hash of source, number and
epoch of the sample), of which the ledger is made. An objective adds its own: `tokens`, `labels`, `pixels`...
"""

Sums = dict[str, tuple[float, float]]
"""Name -> (sum, count) over all ranks; the metric is sum / count."""

Watch = Callable[[dict[str, Tensor]], None]


@dataclass
class StepResult:
    """What one optimizer step reports; equal on all ranks.

    Attributes:
        loss: mean over what the objective counts in the global batch, in nats.
        grad_norm: L2 norm of the whole gradient before clipping.
        tokens: tokens (patches) of the global batch that the model read.
        rows: samples in the global batch.
        skipped: the update was left out (fp16 overflow).
        metrics: what the objective adds: numbers, or lists of them.
        used: which samples the ranks read, for the ledger; None if batches have no keys.
    """

    loss: float
    grad_norm: float
    tokens: int
    rows: int = 0
    skipped: bool = False
    metrics: dict[str, float | list[float]] = field(default_factory=dict)
    used: Used | None = None


@dataclass
class State:
    """State of a run, free of layout.

    Attributes:
        tensors: canonical name -> tensor, a DTensor where it is spread, or what else says which part of the whole is
            here (`parallel.checkpoint.fragments`); shapes are global.
        numbers: JSON values: step counts, scales, cursors.
    """

    tensors: dict[str, Any] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """One way to spread a model.

    Attributes:
        before_update: called in a step after the backward, before weights and moments change: who reads them
            in the background must have finished then.
    """

    before_update: Callable[[], None]

    @property
    def objective(self) -> nn.Module:
        """Model, head and loss."""

    def train_step(self, batch: Batch, step: int, watch: Watch | None = None) -> StepResult:
        """Forward, backward, reduce, clip and update on this rank's rows of global batch number `step`.

        `watch` is shown the gradients by name, reduced and not yet clipped.
        """

    def learning_rate(self, step: int) -> float:
        """Learning rate (`optimizer.lr` times the schedule's factor) of a step."""

    def evaluate(self, batch: Batch) -> Sums:
        """`loss` (of what the objective scores) and its metrics over all ranks' rows; ranks may hold different
        numbers of them."""

    def state(self) -> State:
        """Weights, optimizer moments and counters under canonical names; tensors alias the live ones."""

    def load(self, state: State) -> None:
        """Take over numbers; tensors were written in place."""
