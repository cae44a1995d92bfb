"""The words of linear attention's kin: what they read and cost.

FLOPs are those of the chunked kernels: states, and half of each chunk's pairs where a mask is causal. A denominator
counts as the eight values that it is computed as.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from headway.kernels.attention.linear import delta, featured, features, gated, linear, rfa, triton
from headway.kernels.attention.registry import ALL, SPREAD, Kernel, Mechanism, Own, Shape

BOTH_WAYS = (ALL | SPREAD | {"maps"}) - {"prefix", "dropout", "bias"}
FORWARD = (ALL | SPREAD) - {"bidirectional", "cross", "prefix", "dropout", "bias"}


def _sums(shape: Shape, width: float) -> float:
    """Sums of values, and of ones, by so many features of a key."""
    values = shape.dim + 8
    states = 2 * (shape.queries + shape.keys) * width * values
    pairs = shape.queries * (min(featured.CHUNK, shape.queries) + 1) / 2 if shape.causal else 0
    return shape.heads * (states + 2 * pairs * (width + values))


def _drawn(shape: Shape, waves: int) -> float:
    """The same, of features drawn at random, and their products with queries and keys."""
    count = shape.settings["features"]
    return _sums(shape, waves * count) + 2 * shape.heads * (shape.queries + shape.keys) * count * shape.dim


def _gated_flops(shape: Shape) -> float:
    pairs = shape.queries * (min(gated.CHUNK, shape.queries) + 1) / 2
    return shape.heads * (4 * pairs * shape.dim + 4 * shape.queries * shape.dim**2)


def _delta_flops(shape: Shape) -> float:
    """Products of keys, products of queries, values by these; a triangular system of 2 D columns; three of states."""
    pairs = shape.queries * (min(delta.CHUNK, shape.queries) + 1) / 2
    return shape.heads * (10 * pairs * shape.dim + 6 * shape.queries * shape.dim**2)


def _bytes(gates: Callable[[Shape], int]) -> Callable[[Shape, int], float]:
    """Queries and output, keys and values, gates."""

    def count(shape: Shape, itemsize: int) -> float:
        asking = shape.heads * shape.queries * (2 * shape.dim + gates(shape))
        return itemsize * (asking + 2 * shape.kv_heads * shape.keys * shape.dim)

    return count


def _kernels(module: Any, in_triton: Any, reference: str, widest: int | None = None) -> dict[str, Kernel]:
    """The reference, with the growth of what it holds, the chunks, and Triton's kernel."""
    facts: Any = {"dropout": False, "bias": False}
    return {
        "reference": Kernel("reference", module.reference, memory=reference, **facts),
        "chunks": Kernel("chunks", module.attention, memory="S", **facts),
        "triton": Kernel(
            "triton", in_triton, memory="S", causal=True, widest=widest, devices=("cuda",), **facts
        ),
    }


def _averages(name: str, module: Any, formula: str, source: str, **facts: Any) -> Mechanism:
    return Mechanism(
        name=name,
        kind="heads",
        formula=formula,
        source=source,
        kernels=_kernels(module, partial(module.attention, by=triton.average), "S^2"),
        bytes=_bytes(lambda shape: 0),
        order="n",
        supports=BOTH_WAYS,
        weights=module.weights,
        **facts,
    )


def _recurrent(
    name: str, module: Any, formula: str, source: str, widest: int | None = None, **facts: Any
) -> Mechanism:
    gates = facts["gates"]
    return Mechanism(
        name=name,
        kind="heads",
        formula=formula,
        source=source,
        kernels=_kernels(module, module.in_triton, "S D^2", widest),
        bytes=_bytes(lambda shape: sum(width(shape) for width in gates.values())),
        state=lambda shape: shape.heads * shape.dim**2,
        order="n",
        supports=FORWARD,
        **facts,
    )


ROWS: tuple[Mechanism, ...] = (
    _averages(
        "linear", linear, "phi(Q) (phi(K)^T V) / phi(Q) sum phi(K), phi = elu + 1",
        "Katharopoulos et al. 2020, equations 5, 7 and 8",
        flops=lambda shape: _sums(shape, shape.dim),
        state=lambda shape: shape.kv_heads * shape.dim * (shape.dim + 1),
    ),
    _averages(
        "performer", features, "as linear, phi(x) = exp(W x - |x|^2 / 2), rows of W orthogonal",
        "Choromanski et al. 2021, section 2",
        settings={"features": 256, "redraw": 1000},
        draws=True,
        flops=lambda shape: _drawn(shape, 1),
        state=lambda shape: shape.heads * (shape.settings["features"] * (shape.dim + 1) + 1),
    ),
    _averages(
        "rfa", rfa, "as linear, phi(x) = [sin(W x), cos(W x)], |x| = 1", "Peng et al. 2021, section 3.1",
        settings={"features": 64, "redraw": 1},
        own={"sigma": Own(lambda shape: (shape.heads, shape.dim), ("constant", 1.0))},
        draws=True,
        flops=lambda shape: _drawn(shape, 2),
        state=lambda shape: shape.heads * 2 * shape.settings["features"] * (shape.dim + 1),
    ),
    _recurrent(
        "gla", gated, "S_t = diag(a_t) S_t-1 + k_t v_t^T, o_t = q_t^T S_t", "Yang et al. 2024 (GLA), equation 3",
        gates={"decay": lambda shape: shape.dim},
        flops=_gated_flops,
    ),
    _recurrent(
        "delta", delta, "S_t = a_t (I - b_t k_t k_t^T) S_t-1 + b_t k_t v_t^T, o_t = q_t^T S_t",
        "Yang et al. 2025 (Gated DeltaNet), equation 10",
        widest=delta.WIDEST,
        gates={"beta": lambda shape: 1, "decay": lambda shape: 1},
        # At first a state keeps 0.99 of itself.
        own={
            "decay_rate": Own(lambda shape: (shape.heads,), ("constant", 0.0)),
            "decay_shift": Own(lambda shape: (shape.heads,), ("constant", -4.6)),
        },
        flops=_delta_flops,
    ),
)  # fmt: skip
