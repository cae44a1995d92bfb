"""Small real files: PNG and JPEG by Pillow, and what goes wrong with them."""

import io

import numpy as np
import pytest
from PIL import Image

from headway.pretrain import config


def encode(pixels, kind="PNG", **options) -> bytes:
    """An array as the bytes of an image file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


def smooth(seed: int, height: int = 40, width: int = 56, channels: int = 3) -> np.ndarray:
    """A picture with some structure, uint8 [H, W, C] ([H, W] if grey)."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 9
    waves = [np.sin(a * y + b * x + c) for a, b, c in rng.uniform(-1, 1, (channels, 3)) * (2, 2, 3)]
    noise = rng.normal(0, 12, (height, width, channels))
    pixels = np.clip(np.stack(waves, -1) * 90 + 128 + noise, 0, 255).astype(np.uint8)
    return pixels if channels > 1 else pixels[..., 0]


@pytest.fixture
def files():
    """Makers of pixels and of file contents."""

    class Files:
        png = staticmethod(lambda seed: encode(smooth(seed)))
        jpeg = staticmethod(lambda seed: encode(smooth(seed), "JPEG", quality=90))
        pixels = staticmethod(smooth)
        encode = staticmethod(encode)

    return Files


@pytest.fixture
def settings(tmp_path):
    """config.Data with its cache in the test's folder; arguments of config.Images by their names."""

    def make(size=16, channels=3, column="image", label="label", **data):
        images = config.Images(size=size, channels=channels, column=column, label=label)
        return config.Data(images=images, cache=str(tmp_path / "cache"), **data)

    return make
