"""The global batch over steps: constant, or growing, as a pure function of the step."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from headway.pretrain import config


class Stage(NamedTuple):
    """Steps of one batch size.

    Attributes:
        step: the first one.
        draw: samples drawn before it.
        rows: of each of its steps.
    """

    step: int
    draw: int
    rows: int


@dataclass(frozen=True)
class BatchSizes:
    """How many rows each optimizer step takes from the order of samples.

    With a ramp, the batch grows from `start` to `global_batch` by `increment`: each size before the last gets
    an equal share of `ramp.samples`, and a step has the size of the share in which it begins (Megatron-LM's
    `--rampup-batch-size`; shares are exact fractions here, floating-point there).

    Args:
        train: the job's `train` section.
    """

    train: config.Train

    def rows(self, step: int) -> int:
        """Rows of the global batch of a step, counted from 0."""
        return self._at_step(step).rows

    def first(self, step: int) -> int:
        """Samples drawn before a step."""
        stage = self._at_step(step)
        return stage.draw + (step - stage.step) * stage.rows

    def step_of(self, draw: int) -> int:
        """The step that takes sample `draw` of the order, from 0: first(step) <= draw < first(step + 1)."""
        stage = self.stages[bisect_right(self.stages, draw, key=lambda s: s.draw) - 1]
        return stage.step + (draw - stage.draw) // stage.rows

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The sizes in order; the last one lasts. Sizes whose shares end within a step before them are left out."""
        ramp, full = self.train.ramp, self.train.global_batch
        if ramp.start is None or ramp.start == full:
            return (Stage(0, 0, full),)
        assert ramp.samples is not None  # a rule of the job
        shares = (full - ramp.start) // ramp.increment
        stages, step, draw = [], 0, 0
        for share in range(shares):
            rows = ramp.start + share * ramp.increment
            end = -(
                -(share + 1) * ramp.samples // shares
            )  # steps that begin before this draw are of this size
            steps = max(0, -(-(end - draw) // rows))
            if steps:
                stages.append(Stage(step, draw, rows))
            step, draw = step + steps, draw + steps * rows
        return (*stages, Stage(step, draw, full))

    def _at_step(self, step: int) -> Stage:
        return self.stages[bisect_right(self.stages, step, key=lambda s: s.step) - 1]
