"""The words: scores, weightings and scopes, which compose; linear, latent and other kinds come from their own files."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from headway.kernels import random
from headway.kernels.attention import (
    blocks,
    dense,
    entropy,
    low_rank,
    rows_content,
    rows_grid,
    rows_linear,
    rows_mixers,
    scopes,
    scores,
    weights,
)
from headway.kernels.attention.compose import Form
from headway.kernels.attention.registry import ALL, SPREAD, Kernel, Kind, Mechanism, Own, Shape

MAPS = frozenset({"maps"})
EVERYTHING = ALL | SPREAD | MAPS


def pairs(shape: Shape) -> int:
    """Pairs of a query and a key that dense attention computes."""
    return shape.queries * (shape.queries + 1) // 2 if shape.causal else shape.queries * shape.keys


def _flops(form: Form, shape: Shape) -> float:
    scope = form.scope and form.scope(shape.settings)
    seen = pairs(shape) if scope is None else scope.pairs(shape.queries, shape.causal)
    products = 4 * shape.heads * shape.dim * seen  # multiply and add, for the scores and for the values
    return products + form.score.flops(shape, seen)


def _bytes(shape: Shape, itemsize: int) -> float:
    """Queries and output, keys and values."""
    return 2 * shape.dim * itemsize * (shape.heads * shape.queries + shape.kv_heads * shape.keys)


def _state(form: Form, shape: Shape) -> float:
    """Keys and values that a later query may see."""
    scope = form.scope and form.scope(shape.settings)
    return 2 * shape.kv_heads * shape.dim * (shape.keys if scope is None else scope.kept(shape.keys))


def _kernels(form: Form) -> dict[str, Kernel]:
    if form.fused:
        plain = form == Form()
        by = (lambda kernel: kernel) if plain else form.by
        found = [
            Kernel("reference", by(dense.reference), dropout=True, bias=True, memory="S^2", traced=True),
            Kernel(
                "sdpa",
                by(dense.sdpa),
                dropout=False,
                bias=True,
                memory="S; S^2 with a mask or if a bias learns",
                traced=True,
            ),
            Kernel(
                "blocks",
                blocks.attention if plain else form.in_blocks,
                dropout=True,
                bias=True,
                memory="S",
                traced=True,
            ),
        ]
    else:
        found = [
            Kernel("reference", form.reference, dropout=True, bias=True, memory="S^2", traced=True),
            Kernel("blocks", form.in_blocks, dropout=True, bias=True, memory="S", traced=True),
        ]
    if form.flexible:
        found.append(Kernel("flex", form.flex, dropout=False, bias=False, memory="S", devices=("cuda",)))
    return {kernel.name: kernel for kernel in found}


def _mechanism(name: str, kind: Kind, part: Form, formula: str, source: str, **facts: Any) -> Mechanism:
    return Mechanism(
        name=name,
        kind=kind,
        formula=formula,
        source=source,
        kernels=_kernels(part),
        flops=lambda shape: _flops(part, shape),
        bytes=_bytes,
        state=lambda shape: _state(part, shape),
        weights=dense.attention_weights if part == Form() else part.weights,
        entropy=entropy.row_entropy if part == Form() else _entropy(part),
        part=part,
        **({"order": "n^2", "supports": EVERYTHING} | facts),
    )


def _entropy(form: Form) -> Any:
    """Entropy of rows where kernels of scaled dot products and softmax compute it."""
    if not form.fused:
        return None

    def compute(q, k, mask, scale=None, bias=None, **x):
        q, k, _, factor = form.score.prepare(q, k, k, dense.score_scale(scale, q), x)
        return entropy.row_entropy(q, k, form.narrowed(mask, x), factor, bias)

    return compute


def composed(name: str, rows: list[Mechanism]) -> Mechanism:
    """The mechanism that several words name together: each gives what the others leave open."""
    plain = Form()
    given = {
        key: value
        for row in rows
        for key, value in row.part._asdict().items()
        if value is not getattr(plain, key)
    }
    form = Form(**given)
    return _mechanism(
        name,
        "scope",
        form,
        "; ".join(row.formula for row in rows),
        "; ".join(row.source for row in rows),
        settings=_joined(row.settings for row in rows),
        own=_joined(row.own for row in rows),
        order=next((row.order for row in rows if row.kind == "scope"), "n^2"),
        supports=reduce(frozenset.intersection, (row.supports for row in rows)),
        draws=any(row.draws for row in rows),
        estimated=any(row.estimated for row in rows),
    )


def _joined(tables: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for table in tables:
        found |= table
    return found


def _per_head(shape: Shape) -> tuple[int, ...]:
    return (shape.heads,)


def _scope(
    name: str, build: Any, formula: str, source: str, order: str, lacks: set[str], **settings: Any
) -> Mechanism:
    supports = EVERYTHING - lacks - {"cross", "prefix"}
    return _mechanism(
        name, "scope", Form(scope=build), formula, source, order=order, supports=supports, settings=settings
    )


def _bigbird(x: Mapping[str, Any]) -> scopes.Scope:
    block = x["block"]
    return scopes.BigBird(
        block, -(-x["global_tokens"] // block), x["random_blocks"], random.key(0, "bigbird")
    )


SCOPES = (
    _mechanism(
        "dense", "scope", Form(), "softmax(Q K^T / sqrt(D)) V",
        "Vaswani et al. 2017, equation 1; grouped: Ainslie et al. 2023",
        supports=EVERYTHING | {"context_ring", "entropy"},
    ),
    _mechanism(
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

SCORES = (
    _mechanism(
        "temperature", "score", Form(score=scores.Temperature()), "softmax(exp(t_h) Q K^T / sqrt(D)) V",
        "Vaswani et al. 2017, with a learned temperature of a head",
        own={"log_temperature": Own(_per_head, ("constant", 0.0))},
    ),
    _mechanism(
        "cosine", "score", Form(score=scores.Cosine()), "softmax(exp(t_h) cos(Q, K)) V",
        "Henry et al. 2020; Liu et al. 2022 (Swin v2), equation 2",
        own={"log_temperature": Own(_per_head, ("constant", 2.302585093))},  # 10, as Swin v2
    ),
    _mechanism(
        "general", "score", Form(score=scores.General()), "softmax(Q W_h K^T) V", "Luong et al. 2015, section 3.1",
        own={"score": Own(lambda s: (s.heads, s.dim, s.dim), ("identity", 0.125))},
    ),
    _mechanism(
        "dot", "score", Form(score=scores.Dot()), "softmax(Q K^T) V", "Luong et al. 2015, section 3.1",
    ),
    _mechanism(
        "additive", "score", Form(score=scores.Additive()), "softmax(u_h . tanh(Q + K)) V",
        "Bahdanau et al. 2015, appendix A.1.2",
        own={"direction": Own(lambda s: (s.heads, s.dim), ("normal", 0.2))},
    ),
    _mechanism(
        "softcap", "score", Form(score=scores.SoftCap()), "softmax(c tanh(Q K^T / (c sqrt(D)))) V",
        "Gemma Team 2024 (Gemma 2), section 2", settings={"softcap": 50.0},
    ),
    _mechanism(
        "talking", "score", Form(score=scores.TalkingHeads()), "P_w softmax(P_l Q K^T / sqrt(D)) V",
        "Shazeer et al. 2020",
        own={n: Own(lambda s: (s.heads, s.heads), ("identity", 1.0)) for n in ("before", "after")},
        supports=EVERYTHING - {"tensor", "context_ulysses"},
    ),
    _mechanism(
        "differential", "score", Form(score=scores.Differential()), "(softmax(Q1 K1^T) - l softmax(Q2 K2^T)) V",
        "Ye et al. 2024, section 2.1",
        own={
            f"lambda_{n}": Own(lambda s: (s.heads, s.dim // 2), ("normal", 0.1)) for n in ("q1", "k1", "q2", "k2")
        },
        settings={"first_lambda": lambda layer: 0.8 - 0.6 * 2.718281828459045 ** (-0.3 * layer)},
        supports=EVERYTHING - {"dropout", "bias"},
    ),
)  # fmt: skip

WEIGHTS = (
    _mechanism(
        "sparsemax", "weights", Form(weighting=weights.Sparsemax()), "sparsemax(Q K^T / sqrt(D)) V",
        "Martins and Astudillo 2016",
    ),
    _mechanism(
        "entmax15", "weights", Form(weighting=weights.Entmax15()), "1.5-entmax(Q K^T / sqrt(D)) V",
        "Peters et al. 2019, section 3",
    ),
    _mechanism(
        "sigmoid", "weights", Form(weighting=weights.Sigmoid()), "sigmoid(Q K^T / sqrt(D) - log n) V",
        "Ramapuram et al. 2024, section 3",
    ),
    _mechanism(
        "sink", "weights", Form(weighting=weights.Sink(), own="sink"), "exp(s) / (sum exp(s) + exp(sink_h)) V",
        "OpenAI 2025 (gpt-oss); Miller 2023", own={"sink": Own(_per_head, ("constant", 0.0))},
    ),
    _mechanism(
        "hard", "weights", Form(weighting=weights.Hard()), "v_j, j drawn from softmax(Q K^T / sqrt(D))",
        "Jang et al. 2017, section 2.2 (straight-through Gumbel)", settings={"temperature": 1.0}, draws=True,
        estimated=True, supports=EVERYTHING - {"cross"},
    ),
)  # fmt: skip

ROWS: tuple[Mechanism, ...] = (
    *SCOPES,
    *SCORES,
    *WEIGHTS,
    *rows_linear.ROWS,
    *low_rank.ROWS,
    *rows_mixers.ROWS,
    *rows_grid.ROWS,
    *rows_content.ROWS,
)
"""All words, in the order of `headway attention ls`."""
