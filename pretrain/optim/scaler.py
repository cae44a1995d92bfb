"""Dynamic loss scaling for fp16, as a few plain numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from headway.pretrain.errors import NonFiniteError

SMALLEST = 2.0**-24
"""Of fp16's subnormals: a gradient that overflows below this scale is not finite at any."""


@dataclass
class LossScale:
    """The factor that keeps small fp16 gradients from vanishing: multiply the loss, divide the gradient.

    An overflow shrinks it and the step is skipped; `interval` good steps in a row let it grow (Micikevicius
    et al. 2018, section 3.2). The sequence is that of `torch.amp.GradScaler`, whose defaults these are.

    Attributes:
        scale: the factor now.
        good_steps: steps without overflow since it last changed.
        growth: factor by which it grows.
        backoff: factor by which it shrinks.
        interval: good steps before it grows.
    """

    scale: float = 65536.0
    good_steps: int = 0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000

    def update(self, overflow: bool) -> None:
        """Take note of a step: whether its gradient held an infinity or NaN (on any rank).

        Raises:
            NonFiniteError: the scale has shrunk below fp16's smallest number; shrinking does not help.
        """
        if overflow:
            self.scale, self.good_steps = self.scale * self.backoff, 0
            if self.scale < SMALLEST:
                raise NonFiniteError(
                    f"the gradient is not finite even at a loss scale of {self.scale / self.backoff:g}: "
                    "the loss itself is not finite; lower optimizer.lr or train in bf16"
                )
            return
        self.good_steps += 1
        if self.good_steps == self.interval:
            grown = self.scale * self.growth
            if grown <= torch.finfo(torch.float32).max:  # the loss it multiplies is fp32
                self.scale = grown
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        """Scale and good steps, as JSON values."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Go on from a saved state."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
