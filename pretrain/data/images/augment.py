"""Crops, turns, shifts, flips, mixup and cutmix as functions of uniform numbers, which are functions of a sample's key.

Nothing here holds a generator: the caller draws with `draws` and hands the numbers in, so an augmented image
depends on its key alone, whatever else is in the batch.

Shapes: `n` samples, `C` channels, `S` the side of the model's square, in pixels.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from headway.kernels import random
from headway.pretrain.data.samples import Ints

if TYPE_CHECKING:
    from PIL.Image import Image

Floats = NDArray[np.floating[Any]]

ATTEMPTS = 10
"""Crops that are drawn before the centre is taken, as torchvision does."""
CROP_DRAWS = 4 * ATTEMPTS
ASPECTS = (3 / 4, 4 / 3)
"""Width over height of a crop."""
MIX_DRAWS = 5
_STREAM = 0x696D6167
"""Word of the counter that keeps these draws apart from others of the same key ("imag")."""


class Box(NamedTuple):
    """Part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int


def draws(keys: Ints, purpose: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1): fp64 [n, count], of each sample's key and a purpose (a small integer)."""
    rows = torch.from_numpy(np.ascontiguousarray(keys))[:, None]
    return random.uniform(rows, torch.arange(count)[None], purpose, _STREAM).numpy()


def crop_box(u: Floats, height: int, width: int, least: float) -> Box:
    """A random crop: share of the area uniform in [least, 1], logarithm of the aspect uniform (Szegedy et al. 2015).

    Of `ATTEMPTS` draws the first that fits into the image counts; if none does, the largest central crop of a
    legal aspect. This is torchvision's RandomResizedCrop.

    Args:
        u: [CROP_DRAWS] uniform numbers.
        height, width: of the image.
    """
    share, aspect, down, right = u.reshape(ATTEMPTS, 4).T
    area = height * width * (least + (1 - least) * share)
    low, high = np.log(ASPECTS)
    ratio = np.exp(low + (high - low) * aspect)
    w, h = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    if not fits.any():
        return _central_box(height, width)
    k = int(fits.argmax())
    box_height, box_width = int(h[k]), int(w[k])
    top, left = int(down[k] * (height - box_height + 1)), int(right[k] * (width - box_width + 1))
    return Box(top, left, box_height, box_width)


def _central_box(height: int, width: int) -> Box:
    """The largest part of a legal aspect, in the middle."""
    h, w = height, width
    if width / height < ASPECTS[0]:
        h = round(width / ASPECTS[0])
    elif width / height > ASPECTS[1]:
        w = round(height * ASPECTS[1])
    return Box((height - h) // 2, (width - w) // 2, h, w)


def resized_crop(image: Image, box: Box, size: int) -> Image:
    """A part of an image as a square of side `size` (bicubic, antialiased)."""
    top, left, height, width = box
    return _resize(image.crop((left, top, left + width, top + height)), size, size)


def resized_centre(image: Image, size: int) -> Image:
    """Resize the shorter side to `size` (bicubic, antialiased), and crop the centre; bitwise if it fits already."""
    width, height = image.size
    short = min(width, height)
    width, height = size * width // short, size * height // short
    image = _resize(image, width, height)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _resize(image: Image, width: int, height: int) -> Image:
    from PIL.Image import Resampling

    return image if image.size == (width, height) else image.resize((width, height), Resampling.BICUBIC)


def turned(image: Image, u: Floats, rotate: float, shear: float) -> Image:
    """Slant along rows and turn around the centre, each by an angle uniform within its bounds; black comes in.

    This is torchvision's RandomAffine (bicubic here), whose angles turn clockwise.

    Args:
        u: [2] uniform numbers: angle of turning, angle of slanting.
        rotate, shear: bounds in degrees.
    """
    from PIL.Image import Resampling, Transform

    angle, slant = np.radians((2 * u - 1) * (rotate, shear))
    # From a place in the output to its source, both around the centre: turn back, then slant back.
    cos, sin, tan = np.cos(angle), np.sin(angle), np.tan(slant)
    matrix = np.array([[1, tan], [0, 1]]) @ np.array([[cos, sin], [-sin, cos]])
    centre = np.array(image.size) / 2
    offset = centre - matrix @ centre
    (a, b), (c, d) = matrix.tolist()
    inverse = (a, b, float(offset[0]), c, d, float(offset[1]))
    return image.transform(image.size, Transform.AFFINE, inverse, Resampling.BICUBIC)


def shift_and_flip(pixels: NDArray[np.uint8], u: Floats, pad: int, flip: bool) -> NDArray[np.uint8]:
    """Pad with black by `pad` pixels on all sides, crop back at random; then mirror with chance 1/2, if `flip`.

    Args:
        pixels: [S, S, C].
        u: [3] uniform numbers: down, right, mirror.
    """
    if pad:
        size = len(pixels)
        top, left = (int(x * (2 * pad + 1)) for x in u[:2])
        pixels = np.pad(pixels, ((pad, pad), (pad, pad), (0, 0)))[top : top + size, left : left + size]
    return pixels[:, ::-1] if flip and u[2] < 0.5 else pixels


def symmetric_beta(u: Floats, v: Floats, alpha: Floats | float) -> Floats:
    """Beta(alpha, alpha) from two uniform numbers, exactly and without rejection.

    Bailey 1994 makes Student's t of nu = 2 alpha degrees of freedom, t^2 / nu = (u^(-1/alpha) - 1) cos^2(2 pi v), and
    1/2 + t / (2 sqrt(nu + t^2)) is the symmetric beta (Devroye 1996, "Random variate generation in one line of code").
    """
    cosine = np.cos(2 * math.pi * v)
    with np.errstate(over="ignore"):  # for a small alpha t is infinite, and the share at an end of [0, 1]
        w = 1 / (np.expm1(-np.log(u) / alpha) * cosine**2)  # nu / t^2
    root = np.sqrt(1 + w)
    smaller = w / (2 * root * (1 + root))  # 1/2 - 1 / (2 root), without cancellation
    return np.where(cosine < 0, smaller, 1 - smaller)


def cut_box(share: float, y: float, x: float, size: int) -> Box:
    """The square of 1 - `share` of the area around a uniform centre, as far as it lies within the image.

    Yun et al. 2019, algorithm 1: the side is S sqrt(1 - share).

    Args:
        y, x: uniform numbers for the centre.
    """
    side = int(size * math.sqrt(1 - share))
    (top, bottom), (left, right) = (
        (max(c - side // 2, 0), min(c + (side + 1) // 2, size)) for c in (int(y * size), int(x * size))
    )
    return Box(top, left, bottom - top, right - left)


def mix(
    pixels: NDArray[np.float32], partner: NDArray[np.float32], u: Floats, mixup: float, cutmix: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mix each sample with its partner: by mixup, by cutmix, or (both given) by one of the two, chosen evenly.

    Args:
        pixels, partner: [n, C, S, S].
        u: [n, MIX_DRAWS] uniform numbers: kind, two for the share, centre of the box.
        mixup, cutmix: alphas of Beta(alpha, alpha), of which the share is drawn; 0 leaves that kind out.

    Returns:
        Mixed pixels [n, C, S, S], and the weight of the sample's own label, fp32 [n]: with cutmix it is the share
        of the area that was kept, so that a box that the border cuts counts as what it covers.
    """
    cut = u[:, 0] < (0.5 if mixup and cutmix else 1.0 if cutmix else 0.0)
    share = symmetric_beta(u[:, 1], u[:, 2], np.where(cut, cutmix or 1.0, mixup or 1.0))
    own = np.where(cut, 1, share).astype(np.float32)[:, None, None, None]
    mixed = pixels * own + partner * (1 - own)
    size = pixels.shape[-1]
    for i in np.flatnonzero(cut):
        top, left, height, width = cut_box(share[i], u[i, 3], u[i, 4], size)
        part = (i, slice(None), slice(top, top + height), slice(left, left + width))
        mixed[part] = partner[part]
        share[i] = 1 - height * width / size**2
    return mixed, share.astype(np.float32)
