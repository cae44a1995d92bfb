"""What is known of every attention mechanism and kernel, as data: tests, costs and the choice read it from here.

A mechanism says what attention means, a kernel how it is computed. The mechanism's `reference` is its specification,
and a contract test holds every registered kernel to it. Words for scores, weightings and scopes compose: `window+sink`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

Compute = Callable[..., Tensor]
"""(q [B, H, Q, D], k and v [B, K, S, D], mask, dropout or None, scale or None, bias [H, Q, S] or None, **extras) ->
[B, H, Q, D]; K key/value heads, S keys; extras are settings and own tensors by name. See `dense.reference`."""

Kind = Literal["score", "weights", "scope", "heads", "mixer"]

ALL = frozenset(
    {
        "causal",
        "bidirectional",
        "cross",
        "documents",
        "padding",
        "prefix",
        "dropout",
        "grouped",
        "bias",
        "scattered",
    }
)
"""What dense attention takes on one device (`scattered`: some places of a row without the others); `rotary`, `tensor`,
`context_ring` and `context_ulysses` are beside."""
SPREAD = frozenset({"rotary", "tensor", "context_ulysses"})


class Shape(NamedTuple):
    """What a cost depends on.

    Attributes:
        heads, kv_heads, dim: of attention.
        hidden: width of the layer's input.
        queries, keys: of one sequence.
        causal: whether a query sees earlier keys only.
        settings: of the mechanism, by name.
        layer: its place, from 0.
    """

    heads: int
    kv_heads: int
    dim: int
    hidden: int
    queries: int
    keys: int
    causal: bool
    settings: Mapping[str, Any]
    layer: int = 0


@dataclass(frozen=True)
class Kernel:
    """One way to compute a mechanism.

    Attributes:
        name: what `model.attention.kernel` calls it.
        compute: the function.
        dropout: computes dropout of attention weights, by coordinates.
        bias: computes a bias of the scores, and its gradient.
        slopes: computes a bias that is described (`slopes.Slopes`), as every kernel with `bias` does.
        memory: growth of what it holds for the backward, beside a bias, in words.
        traced: whether torch.compile traces it; loops over chunks gain less than they take to compile.
        causal: whether it computes causal attention alone.
        widest: head dimension at most, of keys and of values; None for any.
        devices: where it runs, forward and backward.
    """

    name: str
    compute: Compute
    dropout: bool
    bias: bool
    memory: str
    slopes: bool = False
    traced: bool = False
    causal: bool = False
    widest: int | None = None
    devices: tuple[str, ...] = ("cpu", "cuda")


class Own(NamedTuple):
    """A parameter of a mechanism.

    Attributes:
        shape: of a shape of attention; the first dim is of heads, by which tensor parallelism cuts it.
        init: kind and value of `schemes.Fill`.
    """

    shape: Callable[[Shape], tuple[int, ...]]
    init: tuple[Any, ...]


@dataclass(frozen=True)
class Mechanism:
    """What attention means.

    Attributes:
        name: what `model.attention.mechanism` calls it.
        kind: `score`, `weights` and `scope` compose; `heads` takes queries, keys and values and does the rest; a
            `mixer` is a module of its own, from layer input to output.
        formula: in a line.
        source: paper and equation.
        settings: numbers of `model.attention` that it reads, and what they are if not given; a function of the layer
            where they depend on it.
        own: its parameters.
        gates: projections of the layer's input, with their width for every head; kernels get [B, H, S, width].
        kernels: by name, `reference` among them; a mixer's compute what its module hands them.
        flops: forward FLOPs of one sequence, beside the projections of queries, keys, values and outputs; a mixer's of
            everything.
        bytes: (shape, bytes per element) -> bytes of one sequence that a fused forward reads and writes at least.
        state: numbers that decoding keeps of a sequence.
        order: growth of time with the length n.
        supports: out of `ALL` and `SPREAD`, `maps` (weights exist), `entropy`.
        weights: (q, k, mask, scale, bias, **extras) -> attention weights [B, H, Q, S], if there are any.
        entropy: (q, k, mask, scale, bias) -> mean entropy of a sample's rows [B], differentiable, in memory O(S).
        drawn: (q, k, v, mask, scale, bias, **extras) -> `reinforce.Drawn`, by kernel, where scores learn by the
            log-probability of what is drawn alone; empty elsewhere. The loss must weigh it.
        part: what the word adds to a composition.
        draws: whether its kernels take `draw`, what random numbers are a function of (`draw.Draw`).
        estimated: whether its gradients are estimates of what finite differences would give.
        narrow: whether values are narrower than keys.
    """

    name: str
    kind: Kind
    formula: str
    source: str
    kernels: dict[str, Kernel]
    flops: Callable[[Shape], float]
    bytes: Callable[[Shape, int], float]
    state: Callable[[Shape], float]
    order: str
    supports: frozenset[str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    own: Mapping[str, Own] = field(default_factory=dict)
    gates: Mapping[str, Callable[[Shape], int]] = field(default_factory=dict)
    weights: Callable[..., Tensor] | None = None
    entropy: Callable[..., Tensor] | None = None
    drawn: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    part: Any = None
    draws: bool = False
    estimated: bool = False
    narrow: bool = False

    def kernels_on(self, device: str) -> dict[str, Kernel]:
        """Those that run on a device, forward and backward."""
        return {name: kernel for name, kernel in self.kernels.items() if device in kernel.devices}


@cache
def words() -> Mapping[str, Mechanism]:
    """Every registered word."""
    from headway.kernels.attention.words import ROWS

    return {row.name: row for row in ROWS}


class UnknownWord(ValueError):
    """A word that is not registered, or words that do not go together.

    Attributes:
        value: the words.
        rule: what must hold.
        nearest: the nearest legal words.
    """

    def __init__(self, value: str, rule: str, nearest: str) -> None:
        self.value, self.rule, self.nearest = value, rule, nearest
        super().__init__(f"attention mechanism {value!r}: {rule}; nearest legal choice: {nearest}")


@cache
def mechanism(name: str) -> Mechanism:
    """The mechanism of a word, or of several joined by "+".

    Raises:
        UnknownWord: a word is not registered, or two say the same kind of thing.
    """
    import difflib

    from headway.kernels.attention.words.composed import composed

    known, parts = words(), name.split("+")
    for word in parts:
        if word not in known:
            near = difflib.get_close_matches(word, known, n=1, cutoff=0.0)[0]
            raise UnknownWord(
                name, f"{word!r} is none of {', '.join(sorted(known))}", name.replace(word, near)
            )
    rows = [known[word] for word in parts]
    if len(rows) == 1:
        return rows[0]
    for row in rows:
        others = [other for other in rows if other is not row]
        if row.part is None:
            raise UnknownWord(name, f"{row.name!r} stands alone: it is not composed", row.name)
        if any(other.kind == row.kind for other in others) or len(others) + 1 != len(rows):
            rule = f"of each kind one word; {row.name!r} says the {row.kind}, as another does"
            raise UnknownWord(name, rule, row.name)
    _check_draws(name, rows)
    return composed(name, rows)


def _check_draws(name: str, rows: list[Mechanism]) -> None:
    """Raise UnknownWord where a key is to be drawn by scores that are not one product a head."""
    drawing = next((row for row in rows if row.kind == "weights" and row.draws), None)
    for row in rows if drawing else ():
        if row.kind == "score" and not (row.part.score.rows and row.part.score.even):
            assert drawing is not None
            rule = f"{drawing.name!r} draws keys by one product of queries and keys a head, {row.name!r} has another"
            raise UnknownWord(name, rule, drawing.name)
