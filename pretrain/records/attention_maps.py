"""Attention maps for the report: every head a small grey picture that is its own data.

A weight w becomes the grey level 255 sqrt(w): the square root keeps small weights visible, and the page's
script squares the level again to say what a cell is worth (to 0.4% at w = 1, 0.03% at w = 0.005).

L layers, H heads, S positions.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class AttentionMaps:
    """What a trained model attends to in one text.

    Attributes:
        tokens: the S pieces of the text, as people read them.
        weights: [L, H, S, S], rows are queries and sum to 1; anything not finite is drawn as 0.
    """

    tokens: list[str]
    weights: NDArray[np.floating]

    def __post_init__(self) -> None:
        size = len(self.tokens)
        if self.weights.ndim != 4 or self.weights.shape[2:] != (size, size):
            raise ValueError(f"weights are {self.weights.shape}, expected [layers, heads, {size}, {size}]")


def draw_heads(maps: AttentionMaps, pixels: int = 2_000_000) -> dict[str, Any]:
    """Pictures and numbers of all heads, for the template.

    If all maps together had more than `pixels` cells, only the first positions are shown (`cut` says so).
    """
    layers, heads, size, _ = maps.weights.shape
    shown = min(size, max(1, int((pixels / max(1, layers * heads)) ** 0.5)))
    weights = _cleaned(maps.weights[:, :, :shown, :shown])
    return {
        "size": shown,
        "cut": size if shown < size else 0,
        "tokens": [readable(token) for token in maps.tokens[:shown]],
        "layers": [[{"picture": _png(w_SS), **describe_head(w_SS)} for w_SS in layer] for layer in weights],
    }


def describe_head(w_SS: NDArray[np.floating]) -> dict[str, float]:
    """Three numbers that tell kinds of heads apart.

    `entropy`: mean over queries, in bits. `reach`: mean distance in tokens between a query and what it
    attends to. `first`: mean share of the first token, where idle heads park attention (the sinks of Xiao et
    al. 2024).
    """
    size = len(w_SS)
    total = np.maximum(w_SS.sum(-1, keepdims=True), 1e-30)
    p_SS = w_SS / total
    entropy = -(p_SS * np.log2(np.maximum(p_SS, 1e-30))).sum(-1).mean()
    distance_SS = np.abs(np.arange(size)[:, None] - np.arange(size)[None, :])
    reach = (p_SS * distance_SS).sum(-1).mean()
    return {"entropy": float(entropy), "reach": float(reach), "first": float(p_SS[:, 0].mean())}


def draw_map(w_SS: NDArray[np.floating]) -> str:
    """A head's picture alone, as a data URI."""
    return _png(_cleaned(w_SS))


def _cleaned(weights: NDArray[np.floating]) -> NDArray[np.floating]:
    return np.nan_to_num(weights.astype(np.float64), posinf=0, neginf=0).clip(0, 1)


def _png(w_SS: NDArray[np.floating]) -> str:
    from PIL import Image  # comes with matplotlib

    buffer = io.BytesIO()
    levels = np.round(255 * np.sqrt(w_SS)).astype(np.uint8)
    Image.fromarray(levels, mode="L").save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def readable(token: str) -> str:
    """Pieces mark a leading space by a low line, and line ends may be byte pieces."""
    return token.replace("\u2581", " ").replace("<0x0A>", "\n").replace("\u0120", " ").replace("\u010a", "\n")
