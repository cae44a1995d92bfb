"""Words for scopes: which places a query sees by where they stand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from headway.kernels import random
from headway.kernels.attention import scopes
from headway.kernels.attention.compose import Form
from headway.kernels.attention.registry import Mechanism
from headway.kernels.attention.words.composed import EVERYTHING, word


def _scope(
    name: str, build: Any, formula: str, source: str, order: str, lacks: set[str], **settings: Any
) -> Mechanism:
    supports = EVERYTHING - lacks - {"cross", "prefix"}
    return word(
        name, "scope", Form(scope=build), formula, source, order=order, supports=supports, settings=settings
    )


def _bigbird(x: Mapping[str, Any]) -> scopes.Scope:
    block = x["block"]
    return scopes.BigBird(
        block, -(-x["global_tokens"] // block), x["random_blocks"], random.key(0, "bigbird")
    )


ROWS = (
    word(
        "dense", "scope", Form(), "softmax(Q K^T / sqrt(D)) V",
        "Vaswani et al. 2017, equation 1; grouped: Ainslie et al. 2023",
        supports=EVERYTHING | {"context_ring", "entropy"},
    ),
    word(
        "window", "scope", Form(scope=lambda x: scopes.Window(x["window"])), "|i - j| < window",
        "Beltagy et al. 2020, section 3.1; Jiang et al. 2023 (Mistral)",
        order="n w", supports=EVERYTHING - {"cross"} | {"context_ring", "entropy"}, settings={"window": 256},
    ),
    _scope(
        "dilated", lambda x: scopes.Dilated(x["window"], x["dilation"]),
        "|i - j| < window dilation, dilation | i - j", "Beltagy et al. 2020, section 3.1", "n w", set(),
        window=128, dilation=2,
    ),
    _scope(
        "local", lambda x: scopes.Local(x["block"], x["neighbours"]), "|i / block - j / block| <= neighbours",
        "Parmar et al. 2018, section 3.3", "n w", set(), block=128, neighbours=1,
    ),
    _scope(
        "strided", lambda x: scopes.Strided(x["stride"]), "|i - j| < stride, or stride | i - j",
        "Child et al. 2019, section 4.2", "n sqrt(n)", set(), stride=128,
    ),
    _scope(
        "fixed", lambda x: scopes.Fixed(x["stride"], x["summaries"]),
        "own block of stride; last summaries of every block",
        "Child et al. 2019, section 4.2", "n sqrt(n)", set(), stride=128, summaries=8,
    ),
    _scope(
        "longformer", lambda x: scopes.Global(x["window"], x["global_tokens"], True),
        "|i - j| < window; the first tokens see and are seen", "Beltagy et al. 2020, section 3.1", "n w", {"documents"},
        window=256, global_tokens=16,
    ),
    _scope(
        "streaming", lambda x: scopes.Global(x["window"], x["global_tokens"], False),
        "|i - j| < window; the first tokens are seen", "Xiao et al. 2024 (StreamingLLM)", "n w",
        {"documents"},
        window=256, global_tokens=4,
    ),
    _scope(
        "bigbird", _bigbird, "blocks beside, first blocks, random blocks", "Zaheer et al. 2020, section 2",
        "n w", {"documents"},
        block=64, global_tokens=128, random_blocks=3,
    ),
)  # fmt: skip
