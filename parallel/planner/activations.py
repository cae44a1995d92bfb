"""Bytes that the backward of a block needs, tensor by tensor, from the configuration alone.

Korthikanti et al. 2022 ("Reducing activation recomputation in large transformer models", section 4.1) count
s b h (34 + 5 a s / h) bytes a layer: 16-bit numbers everywhere, dropout, GELU, S x S attention. Here it is what this
implementation keeps, in whatever dtypes, with whatever kernel: `table` has one line for each tensor and says which of
the paper's it is. With their choices the lines give: norms 4 s b h (the paper's; plus the residual stream in fp32,
which is w instead of 2 bytes wide), queries, keys and values 6, output of attention 2, feed-forward 18 of the paper's
19 (dropout's mask is the rest), and for the `reference` kernel 4 to 11 a s^2 b, where the paper has 5.

Under tensor parallelism a place has the model that a rank computes (`spread.of_rank`), which gives the paper's equation
2: s b h (10 + 24 / t + 5 a s / (h t)). Sequence parallelism (`cut`) gives s b h (4 + 30 / t + 5 a s / (h t)): it is
equation 4, 34 / t, but for the inputs of products, which the paper gathers again and which stay gathered here.

Symbols: T tokens of a micro-batch, M tokens of the encoder, E hidden size, H heads, D head dimension, K key/value
heads, F feed-forward size, S places that a query sees; w bytes of the residual stream, n bytes of products.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from headway.pretrain.config import Model

Kernel = Literal["sdpa", "blocks", "cpp", "reference"]
Policy = Literal["none", "attention", "products", "full"]


class Term(NamedTuple):
    """Bytes of one kind of tensor.

    Attributes:
        name: what it is.
        bytes: of a block.
        part: what computes it: `attention` is the core between projections.
        product: whether the policy `products` keeps it.
    """

    name: str
    bytes: float
    part: Literal["norm", "projection", "attention", "mlp", "residual", "weights"]
    product: bool = False


@dataclass(frozen=True)
class Place:
    """A block in its tower, on one rank, in one micro-batch.

    Attributes:
        model: shape of the block.
        rows: of the micro-batch.
        length: places of a row that are keys and values.
        layer: its number in the tower.
        uses: how often the tower uses it.
        outputs: places of a row that are queries, the same as `length` almost always.
        memory: tokens of the encoder's row, for cross-attention; 0 has none.
        causal: whether a token sees earlier ones only.
        separated: whether documents or a prefix bound what is seen.
        kernel: what computes attention.
        wide, narrow: bytes of a number in the residual stream and in products.
        tensor: ranks over which heads and widths are cut; the model is one rank's.
        cut: ranks over which places are cut too between products (sequence parallelism).
        context: ranks that hold other places of the rows.
        ring: whether their keys come by; else heads are exchanged for places (Ulysses).
    """

    model: Model
    rows: int
    length: int
    layer: int = 0
    uses: int = 1
    outputs: int = 0
    memory: int = 0
    causal: bool = True
    separated: bool = False
    kernel: Kernel = "sdpa"
    wide: int = 4
    narrow: int = 4
    tensor: int = 1
    cut: int = 1
    context: int = 1
    ring: bool = True

    @property
    def stream(self) -> int:
        """Tokens of the residual stream on this rank, after the attention."""
        return self.rows * -(-(self.outputs or self.length) // self.cut)

    @property
    def entering(self) -> int:
        """Tokens of the residual stream on this rank, before the attention."""
        return self.rows * -(-self.length // self.cut)

    @property
    def tokens(self) -> int:
        """Queries of the micro-batch."""
        return self.rows * (self.outputs or self.length)

    @property
    def keys(self) -> int:
        return self.rows * self.length

    @property
    def cast(self) -> bool:
        """Whether products are narrower than the residual stream."""
        return self.narrow != self.wide


def table(p: Place) -> list[Term]:
    """All that the backward of a block needs if nothing is computed again."""
    e, t = p.model.hidden, p.tokens
    terms = [*_norm(p, "attention"), *_attention(p, p.keys, p.length * p.context, cross=False)]
    if p.memory:
        copy = p.narrow * p.rows * p.memory * e if p.cast else 0
        terms += [
            *_norm(p, "cross"),
            Term("encoder's output, narrowed", copy, "projection"),
            *_attention(p, p.rows * p.memory, p.memory * p.context, cross=True),
        ]
    terms += _norm(p, "mlp")
    terms += _experts(p) if p.model.has_experts(p.layer) else _mlp(p, t, p.model.ffn_width)
    layers = 3 if p.memory else 2
    if p.model.dropout:
        terms.append(Term("masks of dropout (paper: 1 of 11, 1 of 19)", layers * p.stream * e, "residual"))
    if p.model.layer_scale:
        terms.append(Term("what layer scale multiplies", 2 * p.narrow * p.stream * e, "residual"))
    terms.append(Term("products' copies of weights", _copies(p), "weights"))
    return terms


def kept(p: Place, policy: Policy) -> float:
    """Bytes of a block that live from its forward to its backward."""
    terms = table(p)
    stream = float(p.wide * p.entering * p.model.hidden)
    if policy == "full":
        return stream
    if policy == "products":
        return stream + _unread(p) + total(term for term in terms if term.product)
    if policy == "attention":
        return total(term for term in terms if term.part != "attention")
    return total(terms)


def _unread(p: Place) -> float:
    """Outputs of products that no backward reads: of o and down, and of up before a relu, which reads its own."""
    outputs = (3 if p.memory else 2) * p.tokens * p.model.hidden
    if p.model.activation == "relu":
        x, routed = p.model.experts, p.model.has_experts(p.layer)
        width = (x.ffn or p.model.ffn_width) * (x.top_k + x.shared) if routed else p.model.ffn_width
        outputs += p.tokens * width
    return float(p.narrow * outputs)


def total(terms: Iterable[Term]) -> float:
    return float(sum(term.bytes for term in terms))


def _norm(p: Place, name: str) -> list[Term]:
    """What a norm keeps, and its output, which the next product keeps. Before or after the sub-layer is the same."""
    t, s = (p.keys, p.entering) if name == "attention" else (p.tokens, p.stream)
    e, kind = p.model.hidden, p.model.norm
    width = {"layernorm": 1, "rmsnorm": 1, "affine": 1, "none": 0}[kind]
    numbers = {"layernorm": 2, "rmsnorm": 1, "affine": 0, "none": 0}[kind]
    return [
        Term(f"{name}: input of the norm (rmsnorm: normed) (paper: 2 s b h)", p.wide * s * e * width, "norm"),
        Term(f"{name}: statistics of the norm", p.wide * s * numbers, "norm"),
        Term(f"{name}: input of products (paper: 2 s b h)", p.narrow * t * e, "norm"),
    ]


def _attention(p: Place, keys: int, seen: int, *, cross: bool) -> list[Term]:
    m, n = p.model, p.narrow
    queries, group = m.heads * m.head_width, m.heads // m.kv
    t, thin = p.tokens, m.kv * m.head_width
    terms: list[Term] = []
    if m.attention.qk_norm:
        normed = p.wide * (t * queries + keys * thin) + p.wide * (t * m.heads + keys * m.kv)
        terms.append(Term("normed queries and keys", normed, "projection"))
    ring = p.context > 1 and p.ring
    fused = p.kernel != "reference" and not (p.kernel == "blocks" and _by_blocks(p)) and not ring
    terms += [
        Term("queries (paper: 2 s b h)", n * t * queries, "projection", product=True),
        Term("keys and values (paper: 4 s b h)", 2 * n * keys * thin, "projection", product=True),
        Term("output of attention (paper: 2 s b h)", n * t * queries, "projection", product=fused),
    ]
    by_heads = Term("output of attention, by heads", n * t * queries, "attention")
    if p.kernel == "reference" and not ring:
        return terms + _quadratic(p, keys, seen, group) + ([by_heads] if p.context > 1 else [])
    terms.append(Term("log-sum-exp of scores", p.wide * t * m.heads, "attention", product=fused))
    if ring:
        return [*terms, by_heads]
    turned = (
        m.positions == "rotary" and p.kernel != "cpp"
    )  # which writes its output by places, as `o` reads it
    if turned or (p.kernel == "blocks" and not _plain(p)) or p.context > 1:
        terms.append(by_heads)
    if p.kernel == "blocks" and group > 1:
        terms.append(Term("keys and values, repeated", 2 * n * keys * (queries - thin), "attention"))
    elif p.kernel == "sdpa" and m.positions == "alibi":
        rows = p.rows if p.separated else 1
        terms.append(Term("bias, written out", n * rows * m.heads * (t // p.rows) * seen, "attention"))
    elif p.kernel == "sdpa" and (p.separated or cross):
        terms.append(Term("mask", n * t * seen, "attention"))
    return terms


def _plain(p: Place) -> bool:
    """Whether the kernel `blocks` takes PyTorch's forward for all queries at once."""
    return not (p.model.attention.dropout or p.separated or p.model.biased)


def _by_blocks(p: Place) -> bool:
    """Whether the kernel `blocks` takes products of its own, and not PyTorch's forward, a block at a time."""
    return bool(p.model.attention.dropout) or (p.separated and not p.model.biased)


def _quadratic(p: Place, keys: int, seen: int, group: int) -> list[Term]:
    """S x S tensors of the reference (paper: 5 a s^2 b: softmax 2, mask 1, dropped 2)."""
    m, square = p.model, p.rows * p.model.heads * (p.tokens // p.rows) * seen
    queries = m.heads * m.head_width
    masks = p.causal or p.separated
    dropped = bool(m.attention.dropout)
    copies = p.narrow * keys * queries * 2 - (0 if group == 1 else p.narrow * keys * m.kv * m.head_width * 2)
    again = p.cast or masks or dropped
    rows = p.rows if p.separated else 1
    return [
        Term("repeated keys and values", copies if group > 1 else 0, "attention"),
        Term("masks", 2 * masks * rows * p.tokens // p.rows * seen, "attention"),
        Term("softmax (paper: 2 a s^2 b)", p.wide * square, "attention"),
        Term("mask of dropout (paper: a s^2 b)", square * dropped, "attention"),
        Term("weights that meet the values (paper: 2 a s^2 b)", p.narrow * square * again, "attention"),
    ]


def _mlp(p: Place, t: float, width: int) -> list[Term]:
    n, name = p.narrow, p.model.activation
    if p.model.gated:
        return [
            Term("gate and up", 2 * n * t * width, "mlp", product=True),
            Term("activated gate", n * t * width, "mlp"),
            Term("input of down", n * t * width, "mlp"),
        ]
    before = 0 if name == "relu" else 1  # relu's backward reads its output
    return [
        Term("input of the activation (paper: 8 s b h)", before * n * t * width, "mlp", product=True),
        Term("input of down (paper: 8 s b h)", n * t * width, "mlp"),
    ]


def _experts(p: Place) -> list[Term]:
    """Routing and experts by grouped products: every pair of token and expert is a row."""
    m, x, t, w, n = p.model, p.model.experts, p.tokens, p.wide, p.narrow
    rows, width = t * x.top_k, x.ffn or m.ffn_width
    terms = [
        Term("router's input", w * t * m.hidden * p.cast, "mlp"),
        Term("router: scores and logits", 4 * w * t * x.count, "mlp"),
        Term("pairs: indices and weights", rows * (4 * 8 + 3 * w), "mlp"),
        Term("rows of tokens", n * rows * m.hidden, "mlp"),
        *_mlp(p, rows, width),
        Term("rows of outputs", n * rows * m.hidden, "mlp", product=True),
    ]
    return terms + (_mlp(p, t, x.shared * width) if x.shared else [])


def _copies(p: Place) -> float:
    """Matrices that are not parameters themselves: narrowed ones, and those scaled by spectral norms."""
    return float(p.narrow * matrices(p) if p.cast or p.model.spectral else 0)


def matrices(p: Place) -> int:
    """Numbers in the matrices of attention and feed-forward layer; experts narrow theirs in passing."""
    m = p.model
    e, wide, thin = m.hidden, m.heads * m.head_width, m.kv * m.head_width
    attention = 2 * e * wide + 2 * e * thin
    x = m.experts
    width = (x.shared * (x.ffn or m.ffn_width)) if m.has_experts(p.layer) else m.ffn_width
    return attention * (2 if p.memory else 1) + e * width * (3 if m.gated else 2)
