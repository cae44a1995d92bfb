"""Words that are modules of their own: from a layer's input to what it adds. FLOPs are of all their products.

Formulas: X tokens, I or L learned points, * products of elements, conv a causal convolution over the row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from headway.kernels.attention import blocks, cpp, dense, entropy, triton
from headway.kernels.attention.mixers import convolution, latent, monarch
from headway.kernels.attention.registry import Kernel, Mechanism, Shape

FILTER_FEATURES = 33
"""Of a place, for the network that makes Hyena's filter."""
WIDENING = 4
"""Feed-forward width of a Perceiver's latents, as a multiple of their own."""


def _plain(compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A dense kernel that is handed settings, which its operands have in them already."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, *given: Any, **_: Any) -> Tensor:
        return compute(q, k, v, *given)

    return kernel


def dense_kernels(*others: Kernel) -> dict[str, Kernel]:
    """Of mechanisms that end in dense attention: its kernels, chosen as for it."""
    kernels = (
        Kernel("reference", _plain(dense.reference), dropout=True, bias=True, memory="S^2"),
        Kernel(
            "sdpa",
            _plain(dense.sdpa),
            dropout=False,
            bias=True,
            memory="S; S^2 with a mask or if a bias learns",
        ),
        *others,
        Kernel("blocks", _plain(blocks.attention), dropout=True, bias=True, memory="S"),
        Kernel("cpp", _plain(cpp.attention), dropout=True, bias=True, memory="S", devices=("cpu",)),
        Kernel(
            "triton",
            _plain(triton.attention),
            dropout=True,
            bias=True,
            memory="S",
            widest=triton.WIDEST,
            devices=("cuda",),
        ),
    )
    return {kernel.name: kernel for kernel in kernels}


def _pairs(shape: Shape) -> int:
    return shape.queries * (shape.queries + 1) // 2 if shape.causal else shape.queries * shape.keys


# Latent attention


def latent_widths(dim: int, settings: Any) -> tuple[int, int, int]:
    """Rank, rank of queries (0: none) and rotary dimension; the paper's 4 D and (even) D / 2 if not given."""
    rotary = dim // 4 * 2 if settings["rotary_dim"] is None else settings["rotary_dim"]
    return settings["rank"] or 4 * dim, settings["query_rank"], rotary


def _mla_flops(s: Shape) -> float:
    rank, query_rank, rotary = latent_widths(s.dim, s.settings)
    wide, asked = s.heads * s.dim, s.heads * (s.dim + rotary)
    queries = s.hidden * query_rank + query_rank * asked if query_rank else s.hidden * asked
    keys = s.hidden * (rank + rotary) + 2 * rank * wide
    projected = s.queries * (queries + wide * s.hidden) + s.keys * keys
    return 2 * projected + 2 * s.heads * _pairs(s) * (2 * s.dim + rotary)


def _mla_bytes(s: Shape, itemsize: int) -> float:
    """Queries and outputs; keys and values of every head, and the key that they share."""
    _, _, rotary = latent_widths(s.dim, s.settings)
    return itemsize * (s.heads * s.queries * (2 * s.dim + rotary) + s.keys * (2 * s.heads * s.dim + rotary))


def _mla_state(s: Shape) -> float:
    rank, _, rotary = latent_widths(s.dim, s.settings)
    return s.keys * (rank + rotary)


# Hyena


def _hyena_flops(s: Shape) -> float:
    e, n, width, taps = s.hidden, s.queries, s.settings["width"], s.settings["kernel_size"]
    filters = FILTER_FEATURES * width + 2 * width * width + width * e
    return 2 * n * (4 * e * e + 3 * e * taps + filters) + convolution.flops(e, n)


# Monarch


def monarch_block(tokens: int) -> int:
    """Width of blocks: the least whose square reaches so many tokens."""
    return math.isqrt(max(tokens, 1) - 1) + 1


def _monarch_flops(s: Shape) -> float:
    block = monarch_block(s.queries)
    return 8 * s.queries * s.hidden * s.heads * s.dim + monarch.flops(s.heads, s.dim, s.queries, block)


def _monarch_bytes(s: Shape, itemsize: int) -> float:
    block = monarch_block(s.queries)
    return itemsize * s.heads * (4 * s.dim * s.queries + 2 * block**3)


# Points and latents


def _attention_flops(s: Shape, queries: int, keys: int) -> float:
    wide, narrow = s.heads * s.dim, s.kv_heads * s.dim
    return 4 * (s.hidden * (queries * wide + keys * narrow) + wide * queries * keys)


def _attention_bytes(s: Shape, queries: int, keys: int) -> float:
    return 2 * s.dim * (s.heads * queries + s.kv_heads * keys)


def _points(s: Shape) -> tuple[int, int]:
    return s.settings["latents"], s.queries


def _induced_flops(s: Shape) -> float:
    m, n = _points(s)
    return _attention_flops(s, m, n) + _attention_flops(s, n, m) + 2 * m * s.hidden**2


def _induced_bytes(s: Shape, itemsize: int) -> float:
    m, n = _points(s)
    return itemsize * (_attention_bytes(s, m, n) + _attention_bytes(s, n, m))


def _perceiver_flops(s: Shape) -> float:
    (m, n), depth = _points(s), s.settings["depth"]
    forward = (1 + depth) * 4 * m * WIDENING * s.hidden**2
    return _attention_flops(s, m, n) + depth * _attention_flops(s, m, m) + forward + _attention_flops(s, n, m)


def _perceiver_bytes(s: Shape, itemsize: int) -> float:
    m, _ = _points(s)
    return _induced_bytes(s, itemsize) + itemsize * s.settings["depth"] * _attention_bytes(s, m, m)


def _points_state(s: Shape) -> float:
    """Keys and values of the points."""
    return 2 * s.kv_heads * s.dim * s.settings["latents"]


_BOTH_WAYS = frozenset({"bidirectional", "padding"})

ROWS: tuple[Mechanism, ...] = (
    Mechanism(
        "mla", "mixer", "softmax([q; q_r] [W_k c; k_r]^T / sqrt(D + R)) W_v c, c = W_d X",
        "DeepSeek-AI 2024 (DeepSeek-V2), section 2.1, equations 9 to 19",
        kernels=dense_kernels(
            Kernel("absorbed", _plain(latent.one_head), dropout=True, bias=True, memory="S^2"),
        ),
        flops=_mla_flops, bytes=_mla_bytes, state=_mla_state, order="n^2",
        supports=_BOTH_WAYS
        | {"causal", "documents", "prefix", "dropout", "bias", "rotary", "entropy", "maps"},
        settings={"rank": None, "query_rank": 0, "rotary_dim": None},
        weights=_plain(dense.attention_weights), entropy=_plain(entropy.row_entropy), narrow=True,
    ),
    Mechanism(
        "hyena", "mixer", "q * (h conv (k * v) + skip (k * v)), h_t = window(t) network(t)",
        "Poli et al. 2023, sections 3.1 to 3.3",
        kernels={
            "reference": Kernel("reference", convolution.reference, dropout=False, bias=False, memory="S^2"),
            "fft": Kernel("fft", convolution.long, dropout=False, bias=False, memory="S"),
        },
        flops=_hyena_flops,
        bytes=lambda s, itemsize: 5 * s.hidden * s.queries * itemsize,  # q, k, v, the filter, the output
        state=lambda s: s.hidden * (s.keys + 3 * (s.settings["kernel_size"] - 1)), order="n log n",
        supports=frozenset({"causal", "padding"}), settings={"kernel_size": 3, "width": 64},
    ),
    Mechanism(
        "monarch", "mixer", "q * P L P R (k * v)", "Dao et al. 2022, definition 3.1; Fu et al. 2023, section 3",
        kernels={
            "reference": Kernel("reference", monarch.reference, dropout=False, bias=False, memory="S^2"),
            "blocks": Kernel("blocks", monarch.blocks, dropout=False, bias=False, memory="S; S^1.5 the matrices"),
        },
        flops=_monarch_flops, bytes=_monarch_bytes, state=lambda s: s.heads * s.dim * s.keys,
        order="n sqrt(n)", supports=_BOTH_WAYS,
    ),
    Mechanism(
        "induced", "mixer", "attention(X, H), H = MAB(I, X)", "Lee et al. 2019, equations 6, 7, 9 and 10",
        kernels=dense_kernels(),
        flops=_induced_flops, bytes=_induced_bytes, state=_points_state, order="n",
        supports=_BOTH_WAYS | {"dropout", "grouped"}, settings={"latents": 32},
    ),
    Mechanism(
        "perceiver", "mixer", "attention(X, Z), Z = depth layers over attention(L, X)",
        "Jaegle et al. 2021, section 3.1; Jaegle et al. 2022, section 3",
        kernels=dense_kernels(),
        flops=_perceiver_flops, bytes=_perceiver_bytes, state=_points_state, order="n",
        supports=_BOTH_WAYS | {"dropout", "grouped"}, settings={"latents": 64, "depth": 1},
    ),
)  # fmt: skip
