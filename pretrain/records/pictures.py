"""Pictures of images and of layers of attention."""

from __future__ import annotations

import base64
import io

import numpy as np
from numpy.typing import NDArray

from headway.pretrain.records.attention_maps import AttentionMaps, describe_head
from headway.pretrain.records.backends.base import Picture
from headway.pretrain.records.map_pairs import spread

LAYERS, HEADS, CELL = 12, 16, 192
"""Layers and heads whose attention is drawn at most, evenly spaced, and about how many pixels wide a head is."""
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


def draw_layers(maps: AttentionMaps) -> dict[int, Picture]:
    """Heads of a layer beside each other, by number of the layer; grey is 255 sqrt(weight), as in the report."""
    from PIL import Image

    layers, heads, size, _ = maps.weights.shape
    chosen, scale = spread(heads, HEADS), max(1, CELL // size)
    weights = np.nan_to_num(maps.weights[:, chosen].astype(np.float64), posinf=0, neginf=0).clip(0, 1)
    pictures = {}
    for layer in spread(layers, LAYERS):
        row = _row(np.sqrt(weights[layer])[:, None]).squeeze(-1)
        picture = Image.fromarray(row)
        picture = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        entropies = (describe_head(w_SS)["entropy"] for w_SS in weights[layer])
        said = ", ".join(f"{head + 1}: {e:.2f}" for head, e in zip(chosen, entropies, strict=True))
        pictures[layer] = Picture(buffer.getvalue(), f"entropy in bits by head: {said}")
    return pictures


def png_of(uri: str) -> bytes:
    """The picture of a data URI."""
    return base64.b64decode(uri.partition(",")[2])
