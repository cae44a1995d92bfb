"""The words for images and graphs: what is known of squeeze-and-excitation, CBAM, non-local blocks, CvT, deformable and
graph attention.

Costs are of a row whose patches fill a square grid behind at most two tokens: both follow from the row's length, for
R^2 + 2 < (R + 1)^2.
"""

from __future__ import annotations

import math

from headway.kernels.attention.grids import deformable, graph, grid
from headway.kernels.attention.registry import Kernel, Mechanism, Shape
from headway.kernels.attention.words.mixers import dense_kernels

IMAGES = frozenset({"bidirectional", "images"})
"""What all that needs a grid takes; it needs all of the grid, so none reads some of the patches (`scattered`)."""


def patches(tokens: int) -> int:
    """Those of a row of so many tokens: the square below."""
    return math.isqrt(tokens) ** 2


def strided(tokens: int, stride: int) -> int:
    """Tokens that are left where every so many rows and columns are kept, with those before the patches."""
    side = math.isqrt(tokens)
    return tokens - side**2 + (-(-side // stride)) ** 2


def edges_of_row(tokens: int, distance: int, causal: bool) -> int:
    """Edges of `graph.near_in_row`."""
    both = graph.pairs(tokens, distance)
    return (both + tokens) // 2 if causal else both


def edges_of_grid(tokens: int, distance: int) -> int:
    """Edges of `graph.near_in_grid`."""
    side = math.isqrt(tokens)
    first = tokens - side**2
    return int(graph.pairs(side, distance) ** 2 + 2 * first * tokens - first**2)


def bottleneck(s: Shape) -> int:
    """Width between the two layers of a gate."""
    return max(1, s.hidden // s.settings["reduction"])


def _se(s: Shape) -> float:
    return 4 * s.hidden * bottleneck(s)


def _cbam(s: Shape) -> float:
    return 2 * _se(s) + 4 * s.settings["kernel_size"] ** 2 * patches(s.queries)


def _non_local(s: Shape) -> float:
    half = max(1, s.hidden // 2)
    return 8 * s.hidden * half * s.queries + 4 * half * s.queries * s.keys


def _cvt(s: Shape) -> float:
    wide, narrow, stride = s.heads * s.dim, s.kv_heads * s.dim, s.settings["stride"]
    keys = strided(s.keys, stride)
    convolved = patches(s.queries) + 2 * strided(patches(s.keys), stride)
    linear = 4 * s.hidden * (wide * s.queries + narrow * keys)
    return 2 * s.hidden * s.settings["kernel_size"] ** 2 * convolved + linear + 4 * wide * s.queries * keys


def _deformable(s: Shape) -> float:
    wide, each = s.heads * s.dim, s.settings["depth"] * s.settings["points"]
    linear = 2 * s.hidden * (wide * (patches(s.keys) + s.queries) + 3 * s.heads * each * s.queries)
    return linear + 10 * wide * each * s.queries  # four corners and a weight for every point


def _gat(s: Shape) -> float:
    wide = s.heads * s.dim
    edges = edges_of_row(s.queries, s.settings["neighbours"], s.causal)
    return 4 * wide * (s.hidden + 1) * s.queries + 2 * wide * edges


def _gatv2(s: Shape) -> float:
    wide = s.heads * s.dim
    edges = edges_of_row(s.queries, s.settings["neighbours"], s.causal)
    return 6 * wide * s.hidden * s.queries + 4 * wide * edges


def _bytes(s: Shape, itemsize: int) -> float:
    return 2 * s.hidden * s.queries * itemsize  # input and output


def _near(s: Shape) -> float:
    """Values of the tokens that a later one may read."""
    return s.heads * s.dim * min(s.keys, s.settings["neighbours"] + 1)


def _kernels(*found: Kernel) -> dict[str, Kernel]:
    return {kernel.name: kernel for kernel in found}


def _plain(name: str, compute: object, memory: str) -> Kernel:
    return Kernel(name, compute, dropout=False, bias=False, memory=memory)  # type: ignore[arg-type]


ROWS: tuple[Mechanism, ...] = (
    Mechanism(
        "se", "mixer", "X sigmoid(W2 relu(W1 mean X))", "Hu et al. 2018, equations 2 to 4",
        _kernels(_plain("reference", grid.squeeze_excite, "S")),
        _se, _bytes, lambda s: 0, "n", IMAGES, settings={"reduction": 16},
    ),
    Mechanism(
        "cbam", "mixer", "X' sigmoid(conv(mean X', max X')), X' = X sigmoid(MLP(mean X) + MLP(max X))",
        "Woo et al. 2018, equations 1 to 3",
        _kernels(_plain("reference", grid.cbam, "S")),
        _cbam, _bytes, lambda s: 0, "n", IMAGES, settings={"reduction": 16, "kernel_size": 7},
    ),
    Mechanism(
        "nonlocal", "mixer", "softmax(theta(X) phi(X)^T) g(X) W, of half the width", "Wang et al. 2018, equation 6",
        dense_kernels(), _non_local, _bytes, lambda s: 0, "n^2", IMAGES | {"dropout"},
    ),
    Mechanism(
        "cvt", "mixer", "softmax(Q K^T / sqrt(D)) V, Q, K, V of depthwise convolutions", "Wu et al. 2021, section 3.2",
        dense_kernels(), _cvt, _bytes, lambda s: 0, "n^2", IMAGES | {"dropout", "grouped"},
        settings={"kernel_size": 3, "stride": 2},
    ),
    Mechanism(
        "deformable", "mixer", "sum over levels l and points p of A_lp V_l(place + offset_lp)",
        "Zhu et al. 2021, equation 3",
        _kernels(
            _plain("reference", deformable.reference, "S^2"), _plain("sampled", deformable.attention, "S")
        ),
        _deformable, _bytes, lambda s: 0, "n", IMAGES, settings={"depth": 1, "points": 4},
    ),
    Mechanism(
        "gat", "mixer", "softmax over neighbours j of LeakyReLU(a (V_i || V_j)), times V_j",
        "Velickovic et al. 2018, equations 1 to 4",
        _kernels(_plain("reference", graph.reference, "S^2"), _plain("edges", graph.attention, "S w")),
        _gat, _bytes, _near, "n w", frozenset({"causal", "bidirectional", "documents", "padding"}),
        settings={"neighbours": 2},
    ),
    Mechanism(
        "gatv2", "mixer", "softmax over neighbours j of a LeakyReLU(Q_i + V_j), times V_j",
        "Brody et al. 2022, equation 7",
        _kernels(_plain("reference", graph.reference_v2, "S^2"), _plain("edges", graph.attention_v2, "S w")),
        _gatv2, _bytes, _near, "n w", frozenset({"causal", "bidirectional", "documents", "padding"}),
        settings={"neighbours": 2},
    ),
)  # fmt: skip
