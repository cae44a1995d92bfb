"""Rows of the registry: attention by content, and by levels."""

from __future__ import annotations

import math
from typing import Any

from headway.kernels.attention.content import hierarchical, logtime, moba, nsa, routing, span, topk
from headway.kernels.attention.registry import SPREAD, Kernel, Mechanism, Own, Shape

TEXT = frozenset({"causal", "documents", "padding", "grouped"})
BOTH = TEXT | {"bidirectional", "dropout"}
MAPS = frozenset({"maps"})


def _row(name: str, file: Any, memory: str, **facts: Any) -> Mechanism:
    """A mechanism whose file has `reference`, `attention` and perhaps `attention_weights`."""
    dropout = "dropout" in facts["supports"]
    kernels = {
        "reference": Kernel("reference", file.reference, dropout=dropout, bias=False, memory="S^2"),
        "blocks": Kernel("blocks", file.attention, dropout=dropout, bias=False, memory=memory),
    }
    weights = file.attention_weights if "maps" in facts["supports"] else None
    return Mechanism(name=name, kind="heads", kernels=kernels, weights=weights, **({"bytes": _bytes} | facts))


def _bytes(shape: Shape, itemsize: int) -> float:
    """Queries and output, keys and values."""
    return 2 * shape.dim * itemsize * (shape.heads * shape.queries + shape.kv_heads * shape.keys)


def _products(shape: Shape, keys: float, products: int = 2) -> float:
    """So many products (scores; scores and values) of every query with so many keys, a multiply and an add each."""
    return 2 * products * shape.heads * shape.dim * shape.queries * keys


def _earlier(shape: Shape) -> float:
    """Keys that a query may see on average."""
    return (shape.keys + 1) / 2 if shape.causal else shape.keys


def _chosen(shape: Shape, block: int = 1) -> float:
    return min(shape.settings["selected"] * block, _earlier(shape))


def _blocks(shape: Shape) -> int:
    return math.ceil(shape.keys / shape.settings["block"])


def _near(shape: Shape, width: int) -> float:
    """Keys less than `width` places away."""
    return min(width if shape.causal else 2 * width - 1, _earlier(shape))


def _kept(shape: Shape, tokens: float) -> float:
    """Keys and values of so many tokens, or summaries."""
    return 2 * shape.kv_heads * shape.dim * min(shape.keys, tokens)


def _all(shape: Shape) -> float:
    return _kept(shape, shape.keys)


def _topk_flops(shape: Shape) -> float:
    return _products(shape, _earlier(shape), 1) + _products(shape, _chosen(shape))


def _moba_flops(shape: Shape) -> float:
    block = shape.settings["block"]
    return _products(shape, _blocks(shape) / 2, 1) + _products(shape, _chosen(shape, block))


def _nsa_flops(shape: Shape) -> float:
    block = shape.settings["block"]
    seen = _blocks(shape) / 2 + _chosen(shape, block) + _near(shape, shape.settings["window"])
    summaries = (
        4 * shape.kv_heads * shape.dim**2 * (shape.keys + _blocks(shape))
    )  # phi, of keys and of values
    return _products(shape, seen) + summaries


def _nsa_bytes(shape: Shape, itemsize: int) -> float:
    learned = 2 * shape.kv_heads * shape.dim * (shape.settings["block"] + 2 * shape.dim)
    return _bytes(shape, itemsize) + itemsize * (3 * shape.heads * shape.queries + learned)


def _nsa_own() -> dict[str, Own]:
    found = {}
    for what in ("key", "value"):
        found[f"{what}_positions"] = Own(lambda s: (s.kv_heads, s.settings["block"], s.dim), ("normal", 0.02))
        for way in ("up", "down"):
            found[f"{what}_{way}"] = Own(lambda s: (s.kv_heads, s.dim, s.dim), ("normal", 0.02))
    return found


def _routing_flops(shape: Shape) -> float:
    near = _products(shape, _near(shape, shape.settings["window"]))
    return near + _products(shape, shape.settings["clusters"], 1)


def _routing_state(shape: Shape) -> float:
    """The last tokens of every cluster; a key/value head's are those of all its query heads."""
    group = shape.heads // shape.kv_heads
    return _kept(shape, group * shape.settings["clusters"] * shape.settings["window"])


def _hierarchical_flops(shape: Shape) -> float:
    block = shape.settings["block"]
    halves = 2 if shape.causal else 1
    return _products(shape, min(block, shape.keys) / halves + _blocks(shape) / halves)


def _levels(shape: Shape) -> int:
    return max(0, (_blocks(shape) - 1).bit_length() - 1)


def _logtime_flops(shape: Shape) -> float:
    sides = 1 if shape.causal else 2
    near = min(
        (0.5 + sides) * shape.settings["block"] + (sides - 1) * shape.settings["block"] / 2, shape.keys
    )
    return _products(shape, near + 1.5 * sides * _levels(shape))


ROWS: tuple[Mechanism, ...] = (
    _row(
        "topk", topk, "S selected",
        formula="softmax over the `selected` largest of Q K^T / sqrt(D)",
        source="Gupta et al. 2021, section 2", settings={"selected": 64}, order="n^2",
        flops=_topk_flops, state=_all, supports=BOTH | SPREAD | MAPS | {"cross", "prefix"},
    ),
    _row(
        "routing", routing, "S",
        formula="softmax over the last `window` tokens with the same nearest of `clusters` centroids",
        source="Roy et al. 2021, section 4, each token in one cluster", order="n (c + w)",
        settings={"clusters": 16, "window": 128},
        own={"centroids": Own(lambda s: (s.heads, s.settings["clusters"], s.dim), ("normal", 1.0))},
        flops=_routing_flops, state=_routing_state,
        supports=(BOTH | SPREAD | MAPS) - {"dropout"},
    ),
    _row(
        "nsa", nsa, "S selected",
        formula="g_1 attention to block summaries + g_2 to the `selected` blocks + g_3 to a window",
        source="Yuan et al. 2025, equations 5 to 12", order="n (n / b + k b + w)",
        settings={"block": 64, "selected": 16, "window": 512},
        own=_nsa_own(), gates={"gate": lambda s: 3},
        flops=_nsa_flops, bytes=_nsa_bytes, state=lambda s: _all(s) + _kept(s, _blocks(s)),
        supports=TEXT | {"rotary"},
    ),
    _row(
        "moba", moba, "S selected",
        formula="softmax over one's own block and the blocks with the largest Q mean(K)",
        source="Lu et al. 2025, section 2.2", order="n (n / b + k b)",
        settings={"block": 128, "selected": 4},
        flops=_moba_flops, state=lambda s: _all(s) + _kept(s, _blocks(s)) / 2,
        supports=TEXT | SPREAD | MAPS,
    ),
    _row(
        "span", span, "S",
        formula="softmax(Q K^T / sqrt(D)) clamp((ramp + z_h - |i - j|) / ramp, 0, 1), normalised, V",
        source="Sukhbaatar et al. 2019, section 2.2", settings={"span": 1024, "ramp": 32}, order="n w",
        own={"reach": Own(lambda s: (s.heads,), ("constant", -2.0))},
        flops=lambda s: _products(s, _near(s, s.settings["span"])),
        state=lambda s: _kept(s, s.settings["span"]), supports=BOTH | SPREAD | MAPS,
    ),
    _row(
        "hierarchical", hierarchical, "S",
        formula="softmax over one's own block and the means of the other blocks, weighted by their counts",
        source="Yang et al. 2016; Zhu and Soricut 2021, section 4", settings={"block": 64}, order="n (b + n / b)",
        flops=_hierarchical_flops, state=lambda s: _kept(s, s.settings["block"] + _blocks(s)),
        supports=BOTH | SPREAD,
    ),
    _row(
        "logtime", logtime, "S (1 + log S / block)",
        formula="softmax over two blocks and the means of O(log n) longer and longer spans, weighted by their counts",
        source="Zhu and Soricut 2021, section 6; Guo et al. 2025, section 3", settings={"block": 64},
        order="n (b + log n)", flops=_logtime_flops,
        state=lambda s: _kept(s, 2 * s.settings["block"] + 4 * _levels(s)), supports=BOTH | SPREAD,
    ),
)  # fmt: skip
