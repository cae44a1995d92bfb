"""What is minimised, and how samples are corrupted for it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from headway.pretrain.config.base import AboveZero, Fraction, NotNegative, Positive, Section, Share
from headway.pretrain.config.distill import Distill


class Infill(Section):
    """Fill-in-the-middle for causal models (Bavarian et al. 2022)."""

    rate: Share = 0.0
    """Share of rows that are turned into prefix, suffix, middle."""
    spm: Share = 0.5
    """Share of those in which the suffix comes first."""


class Masking(Section):
    """Masked language modelling (Devlin et al. 2019)."""

    rate: Fraction = 0.15
    """Share of tokens that are predicted."""
    mask: Share = 0.8
    """Share of those that are shown as [MASK]."""
    random: Share = 0.1
    """Share of those that are shown as a random token; the rest is shown as it is."""
    unit: Literal["token", "word", "span"] = "token"
    """What is masked together: a token, all tokens of a word, or a span (Joshi et al. 2020)."""
    span_mean: AboveZero = 3.8
    """Mean length of a span, of a geometric distribution cut off at `span_max`."""
    span_max: Positive = 10
    pairs: Literal["none", "next", "order"] = "none"
    """Two segments a row, with next-sentence (BERT) or sentence-order (ALBERT) prediction."""


class Spans(Section):
    """Span corruption (Raffel et al. 2020, section 3.3.4)."""

    rate: Fraction = 0.15
    """Share of tokens that are replaced."""
    mean: AboveZero = 3.0
    """Mean length of a span."""
    sentinels: Positive = 100
    """Ids at the end of the vocabulary that stand for spans."""


class Denoiser(Section):
    """One member of UL2's mixture: span corruption, or (rate 0) a split into prefix and suffix."""

    mode: Literal["R", "X", "S"]
    """Paradigm token that stands before the row."""
    rate: Fraction
    mean: AboveZero = 3.0
    weight: AboveZero = 1.0


UL2 = [
    Denoiser(mode="R", rate=0.15, mean=3.0),
    Denoiser(mode="R", rate=0.15, mean=8.0),
    Denoiser(mode="S", rate=0.0),
    Denoiser(mode="X", rate=0.5, mean=3.0),
    Denoiser(mode="X", rate=0.5, mean=8.0),
    Denoiser(mode="X", rate=0.15, mean=64.0),
    Denoiser(mode="X", rate=0.5, mean=64.0),
]
"""Tay et al. 2022, table 1 (the seven denoisers, mixed evenly)."""


class Augment(Section):
    """What training images go through; held-out images are only resized."""

    crop: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Least share of an image's area that a random crop keeps; 1 does not crop."""
    shift: NotNegative = 0.0
    """Pad by this share of the side, then crop back at random: small translations."""
    rotate: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Turn by up to so many degrees either way."""
    shear: Annotated[float, Field(ge=0, lt=90)] = 0.0
    """Slant along rows by up to so many degrees either way, as handwriting is."""
    flip: bool = False
    """Mirror half of the images left to right."""
    mixup: NotNegative = 0.0
    """Alpha of mixup (Zhang et al. 2018); 0 does not mix."""
    cutmix: NotNegative = 0.0
    """Alpha of cutmix (Yun et al. 2019); with mixup, each takes half of the batches' rows."""


class Reconstruct(Section):
    """Masked autoencoding of images (He et al. 2022)."""

    rate: Fraction = 0.75
    """Share of patches that the encoder does not see."""
    layers: Positive = 8
    hidden: Positive = 512
    heads: Positive = 16
    normalise: bool = True
    """Predict the pixels of a patch normalised by its own mean and deviation."""


def _denoiser(value: Any) -> Any:
    return Denoiser.model_validate(value) if isinstance(value, dict) else value


class Objective(Section):
    """What is minimised."""

    name: Literal["causal", "prefix", "masked", "spans", "ul2", "pairs", "classify", "mae"] = "causal"
    """`causal`, `prefix`: gpt (prefix also t5). `masked`: bert. `spans`, `ul2`, `pairs`: t5. `classify`, `mae`: vit."""
    z_loss: NotNegative = 0.0
    """Weight of the squared log-partition function (PaLM, section 5)."""
    chunk: Positive | None = None
    """Rows of logits that exist at once; chosen by the kernel if not given."""
    label_smoothing: Fraction = 0.0
    """Share of the target's probability that is spread evenly over all classes or tokens."""
    pool: Literal["first", "mean"] = "first"
    """What a classifier of images reads: the class token, or the mean of the patches."""
    infill: Infill = Infill()
    masking: Masking = Masking()
    spans: Spans = Spans()
    denoisers: Annotated[list[Annotated[Denoiser, BeforeValidator(_denoiser)]], Field(min_length=1)] = UL2
    augment: Augment = Augment()
    mae: Reconstruct = Reconstruct()
    distill: Distill = Distill()
