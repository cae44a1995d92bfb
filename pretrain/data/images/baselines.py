"""What a model of images is compared with in the report."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class PatchErrors(NamedTuple):
    """Mean squared errors of two constant predictions.

    Attributes:
        one: of one mean patch, the same everywhere.
        placed: of a mean patch for each place, which is the mean image; never above `one` on the images it was
            taken from.
    """

    one: float
    placed: float


def logistic_accuracy(train_x: Array, train_y: Array, test_x: Array, test_y: Array) -> float | None:
    """Share of test images that multinomial logistic regression on pixels names rightly; None without scikit-learn.

    Args:
        train_x, test_x: [n, ...], flattened, and scaled by the mean and deviation of each training pixel.
        train_y, test_y: int [n].
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        return None
    train, test = (x.reshape(len(x), -1).astype(np.float64) for x in (train_x, test_x))
    mean, deviation = train.mean(0), train.std(0)
    deviation[deviation == 0] = 1
    model = LogisticRegression(max_iter=2000).fit((train - mean) / deviation, train_y)
    return float(model.score((test - mean) / deviation, test_y))


def mean_patch_error(train: Array, test: Array, patch: int, normalise: bool) -> PatchErrors:
    """Mean squared error over all patches of test images of predicting the mean patch of training images.

    Args:
        train, test: pixels [n, C, S, S], S a multiple of `patch`.
        normalise: compare patches normalised by their own mean and deviation, as a masked autoencoder's target
            is (He et al. 2022, section 4: `objective.mae.normalise`).
    """
    seen, asked = (cut_into_patches(x, patch, normalise) for x in (train, test))
    one, placed = ((asked - seen.mean(dims)) ** 2 for dims in ((0, 1), (0,)))
    return PatchErrors(float(one.mean()), float(placed.mean()))


def cut_into_patches(pixels: Array, patch: int, normalise: bool) -> NDArray[np.float64]:
    """Patches of [n, C, S, S]: fp64 [n, (S / patch)^2, patch^2 C], row by row; see `mean_patch_error`."""
    n, c, size, _ = pixels.shape
    grid = pixels.reshape(n, c, size // patch, patch, size // patch, patch).astype(np.float64)
    patches = grid.transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, patch * patch * c)
    if not normalise:
        return patches
    deviation = np.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
    return (patches - patches.mean(-1, keepdims=True)) / deviation
