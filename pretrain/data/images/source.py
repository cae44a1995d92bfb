"""A source of images: images by number, with names and classes; the held-out split; broken ones counted and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from headway.pretrain.data.images.decode import BrokenImage, decode, from_array
from headway.pretrain.data.samples import Ints
from headway.pretrain.data.workers import is_heldout
from headway.pretrain.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

REPORTED = 20
"""Broken images that are named one by one; all are counted."""
UNLABELLED = -1


@dataclass
class ImageSource:
    """Images by number, with a class each.

    A broken image that training meets ends it (`data.on_error: stop`), or is left out, counted and named once
    (`skip`). Images are not decoded when the source is opened: that would cost one epoch of decoding before the
    first step. The price is that under `skip` the number of samples counts broken ones too, and each is
    stood in for by the next whole one, which is so seen twice; and that `skipped` is known only as far as this
    process has read.

    Attributes:
        name: of the source, as the job names it.
        classes: names of the classes, by number; empty without labels.
        labels: int64 [N], UNLABELLED where there is none.
        names: of the images.
        load: number -> encoded bytes, or pixels uint8 [H, W] or [H, W, C].
        where: number -> the place to show to people.
        channels, heldout, on_error: as in config.Images and config.Data.
        in_order: the last images are held out, where the order is part of the data's definition, instead of those
            that a hash of their names chooses.
    """

    name: str
    classes: list[str]
    labels: Ints
    names: Sequence[str]
    load: Callable[[int], bytes | NDArray[np.uint8]]
    where: Callable[[int], str]
    channels: int
    heldout: float
    on_error: str
    encoded: bool = True
    in_order: bool = False
    _broken: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def raw(self, number: int) -> tuple[Image, int]:
        """An image of mode `L` (one channel) or `RGB` (three), and its class.

        Raises:
            BrokenImage: it cannot be decoded; names file, member or row, and the reason.
            DataError: the file cannot be read.
        """
        label = int(self.labels[number])
        try:
            found = self.load(number)
            if isinstance(found, bytes):
                return decode(found, self.channels), label
            return from_array(found, self.channels), label
        except BrokenImage as fault:
            raise BrokenImage(f"{self.where(number)}: {fault}") from fault
        except OSError as fault:
            raise DataError(f"{self.where(number)}: cannot be read: {fault}") from fault

    def whole(self, number: int) -> tuple[Image, int] | None:
        """The same; None for a broken image under `data.on_error: skip`, which is then counted."""
        if number in self._broken:
            return None
        try:
            return self.raw(number)
        except BrokenImage as fault:
            if self.on_error == "stop":
                raise BrokenImage(f"{fault}; mend it, or leave such out with data.on_error=skip") from fault
            self._broken[number] = str(fault)
            return None

    @property
    def skipped(self) -> int:
        """Broken images that this process has met."""
        return len(self._broken)

    @property
    def skipped_first(self) -> list[str]:
        """The first of them by number, `PLACE: reason`."""
        return [self._broken[number] for number in sorted(self._broken)[:REPORTED]]

    def side(self, heldout: bool, labelled: bool = True) -> Ints:
        """Numbers of the images of one side of the split, ascending: int64.

        Args:
            labelled: each must have a class; under `skip` those without are left out, and counted.

        Raises:
            DataError: an image has no class.
        """
        first = round(len(self) * (1 - self.heldout))
        mine = [
            i
            for i, name in enumerate(self.names)
            if (i >= first if self.in_order else is_heldout(name, self.heldout)) == heldout
        ]
        numbers = np.array(mine, dtype=np.int64)
        missing = numbers[self.labels[numbers] == UNLABELLED] if labelled else numbers[:0]
        if missing.size and (self.on_error == "stop" or missing.size == numbers.size):
            rule = "the objective needs a folder for each class, or data.images.label to name what holds it"
            raise DataError(
                f"{self.where(int(missing[0]))}: no class, nor have {missing.size - 1} others; {rule}"
            )
        self._broken |= {i: f"{self.where(i)}: no class" for i in missing.tolist()}
        return np.setdiff1d(numbers, missing) if missing.size else numbers
