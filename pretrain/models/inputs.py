"""What the data tells a model about its inputs."""

from __future__ import annotations

from typing import NamedTuple


class Inputs(NamedTuple):
    """Sizes that a model is built for; 0 where they do not apply.

    Attributes:
        vocab: rows of the token table, special tokens included.
        length: tokens that the model reads in a row; of images, patches and the tokens before them.
        target_length: tokens of the decoder's row, of an encoder-decoder.
        image: side of an image in pixels.
        channels: of an image.
        classes: of labelled images.
    """

    vocab: int = 0
    length: int = 0
    target_length: int = 0
    image: int = 0
    channels: int = 0
    classes: int = 0
