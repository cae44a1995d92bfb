"""What words that compose come to, alone and together: kernels, costs and maps of a composition."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

from headway.kernels.attention import blocks, dense, entropy, flash, reinforce, triton
from headway.kernels.attention.compose import Form
from headway.kernels.attention.registry import ALL, SPREAD, Kernel, Kind, Mechanism, Shape

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
        facts: Any = {"memory": "S", "traced": True, "devices": ("cpu",)}
        found.append(Kernel("cpp", form.in_cpp, dropout=True, bias=True, **facts))
        found.append(
            Kernel("flex", form.flex, dropout=False, bias=False, slopes=True, memory="S", devices=("cuda",))
        )
    if form.flexible or form.sparse:
        facts = {"memory": "S", "bias": form.flexible, "widest": triton.WIDEST, "devices": ("cuda",)}
        found.append(Kernel("triton", form.in_triton, dropout=True, **facts))
    if form.fused and form.score.even and form.scope is None:
        found += [
            Kernel(
                name, form.by(flash.attention(name)), dropout=False, bias=False, memory="S", devices=("cuda",)
            )
            for name in flash.PACKAGES
        ]
    return {kernel.name: kernel for kernel in found}


def word(name: str, kind: Kind, part: Form, formula: str, source: str, **facts: Any) -> Mechanism:
    """The mechanism of a composition; `facts` are fields of `Mechanism` that differ from dense attention's."""
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
        drawn=_drawn(part),
        **({"order": "n^2", "supports": EVERYTHING} | facts),
    )


def _drawn(form: Form) -> dict[str, Any]:
    """What gives the log-probability of what is drawn, by kernel, where scores learn by it."""
    if not form.weighting.scored:
        return {}
    return {
        "reference": partial(reinforce.reference, form),
        "blocks": partial(reinforce.in_blocks, form),
    }


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
    return word(
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


def per_head(shape: Shape) -> tuple[int, ...]:
    """A number for every head."""
    return (shape.heads,)
