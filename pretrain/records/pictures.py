"""Pictures of images for the report."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

HIDDEN = 0.55
"""Grey of what the encoder does not see."""
GAP = 2
"""Pixels between images, before enlargement to about 64 pixels each."""


def draw_reconstructions(seen: NDArray, painted: NDArray, true: NDArray) -> str:
    """One picture as a data URI: rows of images as the encoder sees them, as they are painted, as they are.

    Args:
        seen, painted, true: [n, C, H, W] of levels in [0, 1]; NaN where nothing is seen.
    """
    from PIL import Image  # comes with matplotlib

    rows = [_row(np.nan_to_num(images, nan=HIDDEN)) for images in (seen, painted, true)]
    gap = np.full((GAP, rows[0].shape[1], rows[0].shape[2]), 255, dtype=np.uint8)
    page = np.concatenate([part for row in rows for part in (row, gap)][:-1])
    picture = Image.fromarray(page.squeeze(-1) if page.shape[-1] == 1 else page)
    scale = max(1, 64 // true.shape[-1])
    picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _row(images: NDArray) -> NDArray[np.uint8]:
    """Images beside each other: [H, n (W + GAP) - GAP, C]."""
    levels = np.round(255 * images.clip(0, 1)).astype(np.uint8).transpose(0, 2, 3, 1)
    gap = np.full((levels.shape[1], GAP, levels.shape[3]), 255, dtype=np.uint8)
    return np.concatenate([part for image in levels for part in (image, gap)][:-1], 1)
