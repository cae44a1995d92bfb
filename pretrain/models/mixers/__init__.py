"""What mixes the tokens of a block: attention, or a module of its own where a mechanism is not made of heads."""

from __future__ import annotations

from torch import nn

from headway.kernels.attention.registry import mechanism
from headway.pretrain import config
from headway.pretrain.models.attention import Attention, attention_shape, word_of
from headway.pretrain.models.mixers.base import Mixer
from headway.pretrain.models.mixers.convolutional import CvT
from headway.pretrain.models.mixers.deformable import Deformable
from headway.pretrain.models.mixers.gates import CBAM, SqueezeExcite
from headway.pretrain.models.mixers.graph import GAT, GATv2
from headway.pretrain.models.mixers.hyena import Hyena
from headway.pretrain.models.mixers.induced import Induced
from headway.pretrain.models.mixers.mla import MLA
from headway.pretrain.models.mixers.monarch import Monarch
from headway.pretrain.models.mixers.non_local import NonLocal
from headway.pretrain.models.mixers.perceiver import Perceiver
from headway.pretrain.models.seat import Seat

MIXERS: dict[str, type[Mixer]] = {
    "mla": MLA,
    "hyena": Hyena,
    "monarch": Monarch,
    "induced": Induced,
    "perceiver": Perceiver,
    "se": SqueezeExcite,
    "cbam": CBAM,
    "nonlocal": NonLocal,
    "cvt": CvT,
    "deformable": Deformable,
    "gat": GAT,
    "gatv2": GATv2,
}
"""Mechanisms of the kind `mixer`."""


def build_mixer(model: config.Model, seat: Seat) -> nn.Module:
    """The layer that mixes tokens at a seat of the model: the mechanism that the config names there."""
    word = word_of(model.attention, seat)
    if mechanism(word).kind != "mixer":
        return Attention(model, seat)
    return MIXERS[word](model, seat, attention_shape(model, word, seat).settings)
