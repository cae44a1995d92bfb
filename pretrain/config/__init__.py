"""The Job: one tree of settings that names a run, strict and self-describing.

One value has one owner. Lengths live in ``data``, the vocabulary in the tokenizer, classes in the images; the model
is told them when it is built. Anything that is left ``None`` is derived, and the property beside it says how.
"""

from __future__ import annotations

from typing import Any, Literal

from headway.pretrain.config import rules
from headway.pretrain.config.base import Section
from headway.pretrain.config.data import Data, Images, Source, Tokenizer
from headway.pretrain.config.model import Attention, Bottleneck, Experts, Init, Model, RotaryScaling, Vision
from headway.pretrain.config.objective import (
    Augment,
    Denoiser,
    Infill,
    Masking,
    Objective,
    Reconstruct,
    Spans,
)
from headway.pretrain.config.optimizer import Optimizer, Schedule
from headway.pretrain.config.run import Checkpoint, Energy, Parallel, Ramp, Run, Tracking, Train

__all__ = [
    "Attention",
    "Augment",
    "Bottleneck",
    "Checkpoint",
    "Data",
    "Denoiser",
    "Energy",
    "Experts",
    "Images",
    "Infill",
    "Init",
    "Job",
    "Masking",
    "Model",
    "Objective",
    "Optimizer",
    "Parallel",
    "Ramp",
    "Reconstruct",
    "RotaryScaling",
    "Run",
    "Schedule",
    "Section",
    "Source",
    "Spans",
    "Tokenizer",
    "Tracking",
    "Train",
    "Vision",
]


class Job(Section):
    """One run, whole."""

    run: Run = Run()
    model: Model = Model()
    data: Data = Data()
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    parallel: Parallel = Parallel()
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp8", "fp64"] = "auto"
    """Dtype of matrix products; weights, optimizer state and reductions stay fp32 (fp64 for fp64)."""
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    tracking: Tracking = Tracking()

    @property
    def row_tokens(self) -> int:
        """Tokens that the model reads in a row: of text, or patches and the tokens before them."""
        if self.model.family != "vit":
            return self.data.seq_len
        vision = self.model.vision
        return (self.data.images.size // vision.patch) ** 2 + vision.prefix_tokens

    def model_post_init(self, _: Any) -> None:
        rules.check(self)
