"""Random numbers of samples, by their keys."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray

from headway.kernels.random import philox

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class Stream(IntEnum):
    """What numbers are for. Streams of one key are independent; a number of these is never given away twice."""

    MASK_ORDER = 0
    MASK_SHOWN = 1
    MASK_LENGTH = 2
    SPAN_NOISE = 3
    SPAN_KEPT = 4
    DENOISER = 5
    PREFIX = 6
    INFILL = 7


def draws(keys: Ints, count: int, stream: int) -> NDArray[np.float64]:
    """Uniform numbers in (0, 1) of 32 bits: fp64 [n, count].

    Number j of a row is a function of (key, stream, j): a larger count adds numbers and changes none.

    Args:
        keys: int64 [n], see `headway.pretrain.data.samples.make_keys`.
        stream: see `Stream`; in [0, 2^32).
    """
    groups = torch.arange(-(-count // 4))  # a Philox call gives four words
    words = philox(
        torch.from_numpy(np.ascontiguousarray(keys, dtype=np.int64))[:, None], groups, int(stream), 0, 0
    )
    flat = torch.stack(words, -1).flatten(1)[:, :count]
    return flat.double().add_(0.5).mul_(2.0**-32).numpy()
