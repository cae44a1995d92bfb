"""How parameters move, and the learning rate over steps."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from headway.pretrain.config.base import AboveZero, Count, Fraction, NotNegative, Positive, Section, as_tuple


class Optimizer(Section):
    """How parameters move. Weight decay spares biases, norms and other vectors."""

    name: Literal["adamw", "muon", "lamb", "adafactor"] = "adamw"
    """`muon` moves hidden matrices by Muon and everything else by AdamW."""
    lr: AboveZero = 3e-4
    betas: Annotated[tuple[Fraction, Fraction], BeforeValidator(as_tuple)] = (0.9, 0.95)
    """Of adamw and lamb."""
    eps: AboveZero = 1e-8
    weight_decay: NotNegative = 0.1
    clip: AboveZero | None = 1.0
    """Gradients are scaled down to this global norm; null does not clip."""
    muon_lr: AboveZero = 0.02
    """Learning rate of the matrices that Muon moves; the schedule scales it as it scales `lr`."""
    momentum: Fraction = 0.95
    """Momentum of Muon."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Every block's learning rate is this times that of the block above; embeddings come last (Clark et al. 2020)."""
    ema: Fraction = 0.0
    """Decay of a moving average of the weights, which evaluations and exports then use; 0 keeps none."""


class Schedule(Section):
    """Learning rate over steps, as a factor of `optimizer.lr`."""

    name: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    warmup: Count = 0
    """Steps of linear warmup."""
    warmup_tokens: Positive | None = None
    """Warmup given in tokens instead of steps."""
    steps: Positive | None = None
    """Where the decay ends; `train.steps` if not given."""
    floor: Fraction = 0.1
    """Last factor of cosine, linear and wsd."""
    decay: Annotated[float, Field(gt=0, le=1)] = 0.2
    """Share of the steps that wsd (warmup, stable, decay) spends on its decay."""
