"""What mixers of images share: which places of a row are patches, sizes that convolutions can have, dropout."""

from __future__ import annotations

from headway.kernels.attention.dense import WeightDropout
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.layers import Dropout, Noise


def first_places(model: config.Model) -> int:
    """Tokens before the patches, which have no place on the grid."""
    return model.vision.prefix_tokens


def odd(side: int) -> int:
    """The side of a convolution, which is odd, so that it has a middle. Raises JobError."""
    if side % 2 == 0:
        raise JobError(
            "model.attention.kernel_size", side, "a convolution has a middle: must be odd", side + 1
        )
    return side


def weight_dropout(dropout: Dropout, noise: Noise | None, queries: int) -> WeightDropout | None:
    """Dropout of attention weights, of a layer that has all heads."""
    if noise is None or dropout.p == 0:
        return None
    return WeightDropout(dropout.p, dropout.key(noise), noise.slots_B, noise.places(queries))
