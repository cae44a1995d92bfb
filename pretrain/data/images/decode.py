"""Encoded bytes or arrays to 8-bit images, grey or colour; what is broken is named.

Images keep the orientation in which they are stored (EXIF is not read), palettes and other colour spaces become
RGB, transparency is dropped, of several frames the first is taken: what torchvision's ImageFolder does.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headway.pretrain.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

MOST_PIXELS = 89_478_485
"""Of an image; Pillow warns from here on, as a small file may unfold to fill the memory."""
MOST_ELONGATED = 100
"""Longer side over the shorter: resizing the shorter side must not fill the memory either."""


class BrokenImage(DataError):
    """An image that cannot be decoded; names it and the reason."""


def pillow() -> Any:
    """The module PIL.Image; DataError if it is not installed."""
    try:
        import PIL.Image
    except ImportError as fault:
        raise DataError(
            "images need Pillow, which is not installed: pip install 'headway[vision]'"
        ) from fault
    return PIL.Image


def decode(data: bytes, channels: int) -> Image:
    """Decode a PNG, JPEG or whatever else Pillow reads.

    Args:
        channels: 1 (grey, by ITU-R 601-2 if the image has colours) or 3 (red, green, blue).

    Returns:
        An image of mode `L` or `RGB`.

    Raises:
        BrokenImage: not an image, truncated, damaged, or of an absurd size; the message is the reason alone.
    """
    if not data:
        raise BrokenImage("empty")
    try:
        image = pillow().open(io.BytesIO(data))
        _check_size(*image.size)
        return as_channels(image, channels)
    except (BrokenImage, MemoryError):
        raise
    except Exception as fault:  # decoders raise OSError, SyntaxError, ValueError, struct.error, IndexError...
        shown = str(fault).partition(" <_io.")[0]
        raise BrokenImage(f"cannot be decoded: {shown or type(fault).__name__}") from fault


def from_array(pixels: NDArray[np.uint8], channels: int) -> Image:
    """An image of mode `L` or `RGB` from [H, W] or [H, W, C] of one or three channels."""
    grey = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return as_channels(pillow().fromarray(np.ascontiguousarray(grey)), channels)


def as_channels(image: Image, channels: int) -> Image:
    """Decode, and convert to mode `L` (1) or `RGB` (3); 16 bits of grey keep their upper eight."""
    if image.mode in ("I", "F"):
        raise BrokenImage(f"values of 32 bits (mode {image.mode}) have no scale; store 8 or 16 bits")
    if image.mode.startswith("I;16"):  # Pillow itself would clip them at 255
        image = pillow().fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("L" if channels == 1 else "RGB")


def _check_size(width: int, height: int) -> None:
    if width * height > MOST_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the {MOST_PIXELS:,} that are decoded")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise BrokenImage(f"{width} x {height} pixels: one side is over {MOST_ELONGATED} times the other")
