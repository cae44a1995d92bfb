"""Decoding: right pixels for whole images, a reason for each way of being broken."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from headway.pretrain.data.images.decode import BrokenImage, decode


def png_of_size(width, height):
    """A PNG whose header promises so many pixels, and that holds none."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_png_is_exact_and_jpeg_is_pillows(files):
    pixels = files.pixels(0)
    assert np.array_equal(np.asarray(decode(files.encode(pixels), 3)), pixels)
    data = files.jpeg(0)
    assert np.array_equal(np.asarray(decode(data, 3)), np.asarray(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize(("channels", "wanted"), [(1, "L"), (3, "RGB")])
def test_every_colour_space_becomes_grey_or_rgb(files, mode, channels, wanted):
    out = io.BytesIO()
    Image.fromarray(files.pixels(1)).convert(mode).save(out, "TIFF")
    image = decode(out.getvalue(), channels)
    assert (image.mode, image.size) == (wanted, (56, 40))
    # A palette of 256 colours is the coarsest of these but the bitmap: its cells are some 40 levels wide.
    if mode != "1" and channels == 3 and mode not in ("L", "LA"):
        assert np.abs(np.asarray(image).astype(int) - files.pixels(1)).mean() < 20


def test_sixteen_bits_keep_the_upper_eight(files):
    deep = (np.arange(256 * 2, dtype=np.uint16) * 128).reshape(16, 32)
    for kind in ("PNG", "TIFF"):
        image = decode(files.encode(deep, kind), 1)
        assert np.array_equal(np.asarray(image), deep // 256)
    with pytest.raises(BrokenImage, match="32 bits"):
        decode(files.encode(deep.astype(np.float32), "TIFF"), 1)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda f: b"", "^empty$"),
        (lambda f: b"this is text", "cannot identify image file$"),
        (lambda f: f.jpeg(0)[:-400], "image file is truncated"),
        (lambda f: f.png(0)[:-3000], "truncated|broken"),
        (lambda f: f.jpeg(0)[:400], "cannot be decoded: Truncated File Read"),
        (lambda f: png_of_size(4, 4), "truncated"),
        (lambda f: png_of_size(1, 101), "one side is over 100 times the other"),
        (lambda f: png_of_size(9500, 9500), "9500 x 9500 pixels are more than"),
        (lambda f: png_of_size(60000, 60000), "exceeds limit"),
    ],
)
@pytest.mark.filterwarnings("ignore:Image size")
def test_what_is_broken_has_a_reason(files, make, reason):
    with pytest.raises(BrokenImage, match=reason):
        decode(make(files), 3)


@pytest.mark.filterwarnings("ignore")
def test_no_damage_raises_anything_else(files):
    """Bytes turned over at random: an image or a BrokenImage, never another error."""
    rng = np.random.default_rng(0)
    outcomes = set()
    for kind in ("PNG", "JPEG", "TIFF", "GIF"):
        data = files.encode(files.pixels(0), kind)
        for _ in range(100):
            damaged = bytearray(data)
            for place in rng.integers(0, min(len(data), 600), 3):
                damaged[place] = rng.integers(256)
            try:
                outcomes.add(decode(bytes(damaged), 3).mode)
            except BrokenImage:
                outcomes.add("broken")
    assert outcomes == {"RGB", "broken"}
