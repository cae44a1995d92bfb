"""What is known of every attention mechanism and kernel, as data: tests, costs and the choice read it from here.

A mechanism says what attention means, a kernel how it is computed. The mechanism's `reference` is its
specification, and a contract test holds every registered kernel to it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from headway.kernels.attention import blocks, dense, entropy

Compute = Callable[..., Tensor]
"""(q [B, H, Q, D], k and v [B, K, S, D], mask, dropout or None, scale or None, bias [H, Q, S] or None) ->
[B, H, Q, D]; K key/value heads, S keys. See `dense.reference`."""


@dataclass(frozen=True)
class Kernel:
    """One way to compute a mechanism.

    Attributes:
        name: what `model.attention.kernel` calls it.
        compute: the function.
        dropout: computes dropout of attention weights, by coordinates.
        bias: computes a bias of the scores, and its gradient.
        memory: growth of what it holds for the backward, beside a bias, in words.
    """

    name: str
    compute: Compute
    dropout: bool
    bias: bool
    memory: str


@dataclass(frozen=True)
class Mechanism:
    """What attention means.

    Attributes:
        name: what `model.attention.mechanism` calls it.
        source: paper and equation.
        kernels: by name, `reference` among them.
        weights: (q, k, mask, scale, bias) -> attention weights [B, H, Q, S], for maps.
        entropy: (q, k, mask, scale, bias) -> mean entropy of a sample's rows [B], differentiable, in memory O(S).
        flops: (query heads, head dimension, tokens, causal, window or None) -> forward FLOPs of one sequence.
        bytes: (query heads, key/value heads, head dimension, tokens, bytes per element) -> bytes of one sequence
            that a fused forward reads and writes at least.
    """

    name: str
    source: str
    kernels: dict[str, Kernel]
    weights: Callable[..., Tensor]
    entropy: Callable[..., Tensor]
    flops: Callable[[int, int, int, bool, int | None], int]
    bytes: Callable[[int, int, int, int, int], int]


def _dense_flops(heads: int, dim: int, tokens: int, causal: bool, window: int | None) -> int:
    near = min(window or tokens, tokens)  # a query and what is at most so many places, less one, before it
    before = near * (near + 1) // 2 + (tokens - near) * near
    pairs = before if causal else 2 * before - tokens
    return 4 * heads * dim * pairs  # multiply and add, for the scores and for the values


def _dense_bytes(heads: int, kv_heads: int, dim: int, tokens: int, itemsize: int) -> int:
    return 2 * (heads + kv_heads) * dim * tokens * itemsize  # q and output, k and v


DENSE = Mechanism(
    name="dense",
    source="Vaswani et al. 2017, equation 1; grouped queries: Ainslie et al. 2023",
    kernels={
        k.name: k
        for k in (
            Kernel("reference", dense.reference, dropout=True, bias=True, memory="S^2"),
            Kernel("sdpa", dense.sdpa, dropout=False, bias=True, memory="S; S^2 if a bias learns"),
            Kernel("blocks", blocks.attention, dropout=True, bias=True, memory="S"),
        )
    },
    weights=dense.attention_weights,
    entropy=entropy.row_entropy,
    flops=_dense_flops,
    bytes=_dense_bytes,
)

MECHANISMS: dict[str, Mechanism] = {m.name: m for m in (DENSE,)}
