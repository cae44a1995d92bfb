"""What lives for a moment in the backward of a block, beside what its forward has left there.

Symbols as in `activations`. Of a block that is computed again, everything that it would have kept is there too.
"""

from __future__ import annotations

from headway.kernels.attention.blocks import block_rows
from headway.parallel.planner.activations import Place, Policy, kept, matrices, table, total


def own_peak(p: Place, policy: Policy) -> float:
    """Most bytes of a block that are alive in its backward: what it kept or computed again, and gradients on their way.

    Gradients of its own parameters count as far as they are there; see `gradients`.
    """
    return max(_in_feed_forward(p, policy), _in_attention(p, policy))


def present(p: Place, policy: Policy) -> float:
    """Bytes of a block when its backward begins, after it was computed again."""
    if policy in ("none", "attention"):
        return kept(p, policy)
    unread = p.narrow * p.tokens * p.model.hidden if policy == "products" else 0  # output of the last product
    return total(table(p)) + unread


def _in_feed_forward(p: Place, policy: Policy) -> float:
    """In the backward of the last product, or of the activation before it."""
    m, t, n, w = p.model, p.tokens, p.narrow, p.wide
    x, routed = m.experts, p.model.has_experts(p.layer)
    rows = t * x.top_k if routed else t
    width = (x.ffn or m.ffn_width) if routed else m.ffn_width
    one, matrix = n * rows * width, m.hidden * width * (x.count if routed else 1)
    stream = w * t * m.hidden
    copied = p.cast or m.dropout or m.layer_scale or m.stochastic_depth
    product = one + (w if routed else n) * matrix + (n * t * m.hidden if copied else 0)
    product += n * rows * m.hidden if routed else 0
    several = m.gated or m.activation in ("relu", "relu2")
    activation = (2 if several else 1) * one + w * matrix
    return present(p, policy) + stream + max(product, activation)


def _in_attention(p: Place, policy: Policy) -> float:
    """In the backward of the attention core, when the feed-forward layer's part is gone."""
    m, n, w = p.model, p.narrow, p.wide
    t, queries = p.tokens, m.heads * m.head_width
    here = [term for term in table(p) if term.part != "mlp" and not term.name.startswith("mlp: ")]
    flow = w * t * m.hidden + n * t * queries  # gradients of the residual stream and of the core's output
    weights = w * (matrices(p) - (2 * m.hidden * m.kv * m.head_width + m.hidden * queries))
    return total(here) + flow + weights + _core(p)


def _core(p: Place) -> float:
    """Bytes that the backward of the attention core uses."""
    m, n, w = p.model, p.narrow, p.wide
    length, seen = p.tokens // p.rows, p.length
    flow = p.tokens * m.heads * m.head_width
    pairs = p.rows * m.heads * seen
    if p.context > 1 and p.ring:
        return _ring(p)
    if p.kernel in ("sdpa", "cpp"):
        return n * 3 * flow
    if p.kernel == "reference":
        square = pairs * length
        return max(n * square + n * flow, (2 * w - n) * square)
    rows = min(seen, block_rows(seen))
    masked, dropped = p.causal or p.separated, bool(m.attention.dropout)
    matrices_: float = 2 + masked + dropped
    if rows < seen:  # a block's matrices live until those of the next take their place
        later = 1 - rows / seen if p.causal and not p.separated else 1.0
        matrices_ = max(matrices_, 2 + dropped + (2 + masked) * later)
    pair = w * matrices_ + dropped + (n if p.cast else 0)
    pieces: float = -(-seen // rows)
    pieces = (pieces + 1) / 2 if p.causal else pieces
    return pairs / seen * rows * length * pair + flow * (n * (6 + dropped + pieces) + 3 * w)


def _ring(p: Place) -> float:
    """Bytes of a part of a ring's backward, a run of queries by a run of keys, beside what travels: keys, values and
    their gradients, each with the buffer that the next ones come into."""
    m, n, w = p.model, p.narrow, p.wide
    runs, masked, dropped = 2, p.causal or p.separated, bool(m.attention.dropout)
    flow, thin = p.tokens * m.heads * m.head_width, p.keys * m.kv * m.head_width
    pairs = p.rows * m.heads * (p.tokens // p.rows // runs) * (p.length // runs)
    pair = w * (2 + masked + dropped) + dropped + (n if p.cast else 0)
    travels = 2 * (n + w) * 2 * thin + w * flow
    return travels + pairs * pair + flow / runs * (n * (7 + dropped) + 3 * w)
