"""What mixers of images share: which places of a row are patches, and sizes that convolutions can have."""

from __future__ import annotations

from headway.pretrain import config
from headway.pretrain.errors import JobError


def first_places(model: config.Model) -> int:
    """Tokens before the patches, which have no place on the grid."""
    return int(model.vision.class_token)


def odd(side: int) -> int:
    """The side of a convolution, which is odd, so that it has a middle. Raises JobError."""
    if side % 2 == 0:
        raise JobError(
            "model.attention.kernel_size", side, "a convolution has a middle: must be odd", side + 1
        )
    return side
