"""Schemes of initial weights: what a parameter's name and shape say about how it begins.

Under every scheme biases are zeros, gains of norms and of sigmaReparam ones, and layer scales
`model.layer_scale`. The schemes differ in matrices, tables and single tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

from headway.kernels.attention.registry import words
from headway.pretrain import config


class Fill(NamedTuple):
    """How a tensor begins.

    Attributes:
        kind: `constant`; `normal`; `truncated` normal, cut off at two deviations; `uniform` in (-value, value);
            `orthogonal`, rows or columns orthonormal, whichever are fewer; `unit`, a vector of norm 1 in a
            uniform direction; `identity` matrices.
        value: the constant, the deviation (before the cut), the bound, the gain, or the diagonal.
    """

    kind: Literal["constant", "normal", "truncated", "uniform", "orthogonal", "unit", "identity"]
    value: float = 1.0


ZEROS, ONES = Fill("constant", 0.0), Fill("constant", 1.0)

MIXERS: dict[str, Callable[[int], Fill]] = {
    "left": lambda width: Fill("normal", width**-0.5),  # Monarch's blocks keep the variance
    "right": lambda width: Fill("normal", width**-0.5),
    "taps": lambda width: Fill("uniform", width**-0.5),  # as torch's convolutions
    "frequency": lambda width: Fill("constant", 14.0),  # of Hyena's sines, as its language models have it
    "skip": lambda width: Fill("normal"),
    "induced": lambda width: Fill("normal"),  # as wide as the normed tokens that they read
}
"""Parameters of mixers that begin alike under every scheme, by name, from the size of the last dim. So do matrices of
the network that makes Hyena's filter: as torch's linear layers."""

TABLES = ("tokens", "positions", "segments")
TOKENS = ("class_token", "distill_token", "mask_token", "latents")
INTO_STREAM = ("o", "down", "exit")
LOOKS = ("offsets", "amounts")
"""Where deformable attention looks, and how much it takes: as its authors, alike for all queries at first."""


class Weight(NamedTuple):
    """A matrix, table, stack of experts' matrices or single token, as schemes see it.

    Attributes:
        path: the canonical name's parts.
        layer: the part that says what it is: `q`, `down`, `tokens`, `class_token`, ...
        shape: of the whole tensor; the last two dims are outputs and inputs, or rows and width.
    """

    path: tuple[str, ...]
    layer: str
    shape: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        return self.shape[-1]

    @property
    def fan_out(self) -> int:
        return self.shape[-2]

    @property
    def in_decoder(self) -> bool:
        """Of an encoder-decoder."""
        return self.path[:2] == ("model", "decoder")

    def is_table(self, model: config.Model) -> bool:
        """Rows that stand for tokens: embeddings, and a language model's own head."""
        return self.layer in (*TABLES, *TOKENS, "extra") or (self.layer == "head" and model.family != "vit")


def rule(name: str, shape: tuple[int, ...], model: config.Model) -> Fill:
    """How the parameter or persistent buffer of a canonical name begins.

    Args:
        name: relative to the objective, such as `model.blocks.0.attention.q.weight`.
        shape: of the whole tensor.
        model: scheme, deviation, depth.
    """
    path = tuple(name.split("."))
    layer = path[-2] if path[-1] == "weight" and len(path) > 1 else path[-1]
    if len(path) > 1 and path[-2] == "own":
        return Fill(*own_fill(layer))
    if layer in ("bias", "step", "queue", "filled") or layer.endswith("_bias"):
        return ZEROS
    if layer in MIXERS:
        return MIXERS[layer](shape[-1])
    if "filter" in path:
        return Fill("uniform", shape[-1] ** -0.5)
    if layer == "gain" or layer.endswith("norm"):
        return ONES
    if layer == "direction":
        return Fill("unit")
    if layer.endswith("_conv"):  # as torch's convolutions
        return Fill("uniform", shape[-1] ** -0.5)
    if layer.startswith("project") and ("tap" in path or "distillation" in path):
        # To a teacher's features: under every scheme, as large as what comes in.
        return Fill("normal", shape[-1] ** -0.5)
    if layer in LOOKS or layer == "baseline":
        return ZEROS
    if layer.endswith("_scale"):
        assert model.layer_scale is not None, name
        return Fill("constant", model.layer_scale)
    return SCHEMES[model.init.scheme](Weight(path, layer, shape), model)


@cache
def own_fill(name: str) -> tuple[Any, ...]:
    """How a mechanism's own parameter begins, under every scheme."""
    return next(row.own[name].init for row in words().values() if name in row.own)


def gpt2(weight: Weight, model: config.Model) -> Fill:
    """Normal; projections into the residual stream get std / sqrt(number of them), so that the stream's variance
    does not grow with depth (GPT-2, section 2.3). There are two a block, three in a decoder with cross-attention.
    """
    if weight.layer not in INTO_STREAM:
        return normal(weight, model)
    sublayers = 3 * model.decoder_depth if weight.in_decoder else 2 * model.layers
    return Fill("normal", model.init.std / math.sqrt(sublayers))


def normal(weight: Weight, model: config.Model) -> Fill:
    """All alike."""
    return Fill("normal", model.init.std)


def bert(weight: Weight, model: config.Model) -> Fill:
    """Truncated normal for all (BERT's code: `tf.truncated_normal_initializer(stddev=0.02)`)."""
    return Fill("truncated", model.init.std)


def t5(weight: Weight, model: config.Model) -> Fill:
    """Normal by fan-in, embeddings and an untied head of deviation 1 (Raffel et al. 2020, as T5X does).

    Queries take over the factor 1 / sqrt(D) that T5's scores lack: (E D)^-1/2; where `attention.scale` keeps
    some of it, they take the rest. Tables of relative positions get E^-1/2.
    """
    if weight.is_table(model):
        return Fill("normal")
    if "relative" in weight.path:
        return Fill("normal", model.hidden**-0.5)
    if weight.layer == "q":
        scale = model.attention.scale or model.head_width**-0.5
        return Fill("normal", (weight.fan_in * model.head_width) ** -0.5 / scale)
    return Fill("normal", weight.fan_in**-0.5)


def xavier(weight: Weight, model: config.Model) -> Fill:
    """Uniform with bound sqrt(6 / (inputs + outputs)) (Glorot and Bengio 2010, equation 16); tables are normal
    with deviation width^-1/2 (as fairseq's Transformer)."""
    if weight.is_table(model):
        return Fill("normal", weight.shape[-1] ** -0.5)
    return Fill("uniform", math.sqrt(6 / (weight.fan_in + weight.fan_out)))


def orthogonal(weight: Weight, model: config.Model) -> Fill:
    """Orthogonal matrices (Saxe et al. 2014), every expert's by itself; tables as `xavier`."""
    return xavier(weight, model) if weight.is_table(model) else Fill("orthogonal")


def tfixup(weight: Weight, model: config.Model) -> Fill:
    """T-Fixup (Huang et al. 2020, section 3.2), for models without norms and without warmup.

    1. Xavier for matrices, N(0, E^-1/2) for embeddings (the second number is the deviation).
    2. v, o and MLP of decoder blocks, and embeddings, times (9 M)^-1/4, M blocks in the decoder.
    3. v, o and MLP of encoder blocks times 0.67 N^-1/4, N blocks in the encoder.

    A GPT is a decoder. Encoders without a decoder scale their embeddings by (9 N)^-1/4: the paper solves for 0.67
    with embeddings of that size.
    """
    fill = xavier(weight, model)
    decoder = model.decoder_depth if model.family == "t5" else model.layers
    if weight.is_table(model) and weight.layer != "head":
        return Fill(fill.kind, fill.value * (9 * decoder) ** -0.25)
    if "blocks" not in weight.path or weight.layer not in ("v", "o", "gate", "up", "down"):
        return fill
    if weight.in_decoder or model.family == "gpt":
        return Fill(fill.kind, fill.value * (9 * decoder) ** -0.25)
    return Fill(fill.kind, fill.value * 0.67 * model.layers**-0.25)


def vit(weight: Weight, model: config.Model) -> Fill:
    """As timm's `init_weights_vit_timm`: normal, whose cut at +-2 is a hundred deviations away; the class token
    1e-6; patches as torch's convolution, uniform with bound fan_in^-1/2. A mask token is normal, as MAE's, and so is a
    distillation token, as timm's."""
    if weight.layer == "class_token":
        return Fill("normal", 1e-6)
    if weight.layer == "patches":
        return Fill("uniform", weight.fan_in**-0.5)
    return normal(weight, model)


SCHEMES: dict[str, Callable[[Weight, config.Model], Fill]] = {
    "gpt2": gpt2,
    "normal": normal,
    "bert": bert,
    "t5": t5,
    "xavier": xavier,
    "orthogonal": orthogonal,
    "tfixup": tfixup,
    "vit": vit,
}
"""By the name that `model.init.scheme` gives them."""
