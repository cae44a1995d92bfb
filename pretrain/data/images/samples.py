"""Batches of pixels out of a source of images: decoded, cropped, augmented, normalised.

Shapes: `n` samples, `C` channels, `S` the side of the model's square.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from headway.pretrain import config
from headway.pretrain.data.images import augment as make
from headway.pretrain.data.images.source import ImageSource
from headway.pretrain.data.samples import Ints, Rows
from headway.pretrain.errors import DataError, JobError

if TYPE_CHECKING:
    from PIL.Image import Image

OWN_CROP, OWN_SHIFT, PARTNER_CROP, PARTNER_SHIFT, CHOICE, MIXING, OWN_TURN, PARTNER_TURN = range(8)
"""Purposes of a key's random numbers. They are part of every run's curve: add at the end."""
MOST_BROKEN = 1000
"""Broken images in a row that are passed over."""


class ImageSamples:
    """Samples of one side of a source; see `headway.pretrain.data.samples.Samples`.

    Training images are cropped at random if `augment.crop` < 1, else resized as held-out ones are: shorter side to
    S, centre cropped, and bitwise untouched if they are S x S already. Then follow turn, shift, flip, normalisation,
    and mixing with a partner: another sample of the same side, chosen and augmented by the sample's own key, so
    that no sample depends on its neighbours in the batch.

    Args:
        source: where images come from.
        numbers: of the images, as `source.side` gives them.
        images: size, channels, mean and deviation.
        augment: what training images go through; None for held-out ones.
        labelled: classes are wanted; mixing needs them.
        threads: that decode encoded images; all cores, 8 at most, if not given.

    Raises:
        DataError: there is no image on this side.
        JobError: a shift that is less than a pixel or as large as the image; mixing without classes.
    """

    def __init__(
        self,
        source: ImageSource,
        numbers: Ints,
        images: config.Images,
        augment: config.Augment | None = None,
        labelled: bool = True,
        threads: int | None = None,
    ) -> None:
        self.source, self.numbers, self.size, self.labelled = source, numbers, images.size, labelled
        self.augment = augment or config.Augment()
        self.pad = round(self.augment.shift * self.size)
        if not numbers.size:
            rule = f"no image on this side of the split of data.heldout = {source.heldout}"
            raise DataError(f"{source.name}: {rule}, of {len(source)} images")
        _check_augment(self.augment, self.pad, self.size, labelled)
        self.levels = normalised_levels(images)
        names = "\0".join(source.names[i] for i in numbers.tolist()).encode(errors="surrogateescape")
        digest = hashlib.blake2b(names, digest_size=8).hexdigest()
        self.identity: dict[str, int | str] = {"images": len(self), "size": self.size, "names": digest}
        threads = threads or min(8, len(os.sched_getaffinity(0)))
        self._pool = ThreadPoolExecutor(threads, "decode") if source.encoded and threads > 1 else None

    def __len__(self) -> int:
        return len(self.numbers)

    def rows(self, indices: Ints, keys: Ints) -> Rows:
        """Samples of these numbers.

        Args:
            indices: int64 [n], each in [0, len).
            keys: int64 [n]; all randomness is a function of them.

        Returns:
            `pixels` fp32 [n, C, S, S]; if labelled, `label` int64 [n]; and if `augment` mixes, `partner` int64 [n],
            the class of the partner, and `share` fp32 [n], the weight of `label` against it.

        Raises:
            DataError: an image is broken or cannot be read; names it.
        """
        indices, keys = np.asarray(indices, np.int64), np.asarray(keys, np.int64)
        pixels, labels = self._augmented(indices, keys, OWN_CROP, OWN_TURN, OWN_SHIFT)
        if not (self.augment.mixup or self.augment.cutmix):
            return {"pixels": pixels, "label": labels} if self.labelled else {"pixels": pixels}
        others = (make.draws(keys, CHOICE, 1)[:, 0] * len(self)).astype(np.int64)
        partner, partner_labels = self._augmented(others, keys, PARTNER_CROP, PARTNER_TURN, PARTNER_SHIFT)
        u = make.draws(keys, MIXING, make.MIX_DRAWS)
        mixed, share = make.mix(pixels, partner, u, self.augment.mixup, self.augment.cutmix)
        return {"pixels": mixed, "label": labels, "partner": partner_labels, "share": share}

    def _augmented(
        self, indices: Ints, keys: Ints, crop: int, turn: int, shift: int
    ) -> tuple[NDArray[np.float32], Ints]:
        """Normalised pixels [n, C, S, S] before mixing, and classes [n]."""
        crops = make.draws(keys, crop, make.CROP_DRAWS if self.augment.crop < 1 else 0)
        turns = make.draws(keys, turn, 2 if self.augment.rotate or self.augment.shear else 0)
        shifts = make.draws(keys, shift, 3 if self.pad or self.augment.flip else 0)
        jobs = (indices.tolist(), crops, turns, shifts)
        done = list(self._pool.map(self._square, *jobs) if self._pool else map(self._square, *jobs))
        channels = self.levels.shape[0]
        squares = np.empty((len(done), self.size, self.size, channels), np.uint8)
        for row, (square, _) in zip(squares, done, strict=True):
            row[:] = square
        pixels = np.empty((len(done), channels, self.size, self.size), np.float32)
        for c, levels in enumerate(self.levels):
            np.take(levels, squares[..., c], out=pixels[:, c])
        return pixels, np.array([label for _, label in done], np.int64)

    def _square(self, index: int, crop: Any, turn: Any, shift: Any) -> tuple[NDArray[np.uint8], int]:
        """One image as uint8 [S, S, C], cropped, turned, shifted and flipped, and its class."""
        image, label = self._whole(index)
        if self.augment.crop < 1:
            box = make.crop_box(crop, image.height, image.width, self.augment.crop)
            image = make.resized_crop(image, box, self.size)
        else:
            image = make.resized_centre(image, self.size)
        if len(turn):
            image = make.turned(image, turn, self.augment.rotate, self.augment.shear)
        pixels = np.asarray(image).reshape(self.size, self.size, -1)
        return make.shift_and_flip(pixels, shift, self.pad, self.augment.flip), label

    def _whole(self, index: int) -> tuple[Image, int]:
        """The image and its class, or, for a broken one under `data.on_error: skip`, those of the next whole one."""
        for step in range(min(len(self), MOST_BROKEN)):
            if found := self.source.whole(int(self.numbers[(index + step) % len(self)])):
                return found
        first = self.source.skipped_first[0]
        raise DataError(f"{self.source.name}: {step + 1} images in a row are broken, one of them {first}")


def _check_augment(augment: config.Augment, pad: int, size: int, labelled: bool) -> None:
    if augment.shift and not 0 < pad < size:
        rule = f"is {pad} pixels of data.images.size = {size}, must be at least 1 and less than all"
        raise JobError("objective.augment.shift", augment.shift, rule, 1 / size)
    for name, alpha in (("mixup", augment.mixup), ("cutmix", augment.cutmix)):
        if alpha and not labelled:
            rule = "mixes classes with pixels, and the objective has none"
            raise JobError(f"objective.augment.{name}", alpha, rule, 0)


def normalised_levels(images: config.Images) -> NDArray[np.float32]:
    """(v / 255 - mean) / std of the values 0 to 255: fp32 [C, 256]."""
    mean, std = (np.array(x).reshape(-1, 1) for x in (images.mean, images.std))
    levels = (np.arange(256) / 255 - mean) / std
    return np.broadcast_to(levels.astype(np.float32), (images.channels, 256))
