"""Gated linear attention, beside the recurrence token by token in fp64."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels.attention.linear.gated import TEMPERATURE, log_decay, reference
from headway.kernels.attention.masks import Mask
from headway.kernels.triton.gated_linear import gated_linear
from headway.kernels.triton.state_tiles import CHUNK
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, once, seed
from headway.tests.kernels.triton.proofs.linear_attention import documents_of
from headway.tests.kernels.triton.roundings import ROUNDING, bounds


def _case(
    shape: tuple[int, int, int, int, int],
    dtype: torch.dtype,
    documents: bool = False,
    scale: float = 1.0,
    extreme: bool = False,
    values: int | None = None,
) -> Case:
    """`shape`: B, H, K, S, D. `extreme`: of some tokens gates forget all, of others nothing. `values`: D of
    values, if another."""
    batch, heads, key_heads, length, width = shape

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())

        def normal(count: int, size: int) -> Tensor:
            return (torch.randn(batch, count, length, size, generator=draw) * scale).to(dtype)

        q, k = (normal(count, width) for count in (heads, key_heads))
        v, d = (normal(count, values or width) for count in (key_heads, heads))
        decay = torch.randn(batch, heads, length, width, generator=draw) * 3
        if extreme:
            which = torch.rand(batch, heads, length, 1, generator=draw)
            decay = decay.masked_fill(which < 0.05, -1e4).masked_fill(which > 0.8, 1e4)
        mask = Mask(documents=documents_of(batch, length, draw) if documents else None)
        here = mask._replace(documents=None if mask.documents is None else mask.documents.to(device))
        given = q, k, v, decay
        ours = [x.clone().to(device).requires_grad_() for x in given]
        out = gated_linear(*ours[:3], here, decay=ours[3])
        found = [out, *torch.autograd.grad(out, ours, d.to(device))]
        wanted = _reference(mask, *given, d)
        apart = bounds(lambda x: _reference(mask, *x), (*given, d), wanted, dtype, draw)
        # Of absolute values it gives the sums of absolute values of the terms, of gradients too.
        _, *terms = whole = _reference(mask, *(x.abs() for x in given[:3]), decay, d.abs())
        sizes = [float(x.abs().max()) for x in whole]
        apart[-1] += 4 * 2.0**-24 / TEMPERATURE * _cancelled(q, k, *terms[:2])
        names = "out", "dq", "dk", "dv", "d_decay"
        rows = zip(names, found, wanted, apart, sizes, strict=True)
        return {name: Result(*row, bound + _exponents(decay) * size) for name, *row, bound, size in rows}

    return compute


def _reference(mask: Mask, *given: Tensor) -> list[Tensor]:
    """Output and gradients, in fp64, of q, k, v, gates, and the gradient of the output."""
    *wide, d = (x.detach().double().requires_grad_() for x in given)
    out = reference(*wide[:3], mask, decay=wide[3])
    return [out.detach(), *torch.autograd.grad(out, wide, d.detach())]


def _cancelled(q: Tensor, k: Tensor, dq: Tensor, dk: Tensor) -> float:
    """Gradients of gates are sums of q dq - k dk over tokens of a chunk, in fp32: greatest sum of absolute values."""
    group = q.shape[1] // k.shape[1]
    terms = q.detach().abs() * dq + (k.detach().abs() * dk).repeat_interleave(group, 1)
    return max(float(x.sum(2).max()) for x in terms.split(CHUNK, 2))


def _exponents(decay: Tensor) -> float:
    """Relative error of a factor: exponents are differences of sums of a chunk's logarithms, rounded in fp32."""
    return 4 * 2.0**-24 * max(float(x.sum(2).abs().max()) for x in log_decay(decay).split(CHUNK, 2))


CASES: dict[str, Case] = (
    {
        f"{dtype}, {width} wide{', documents' if documents else ''}": _case(
            (2, 4, 2, 90, width), dtype, documents
        )
        for dtype, documents in ((torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True))
        for width in (40, 64, 80, 128, 256)
    }
    | {f"{dtype}, one row": _case((1, 1, 1, 1, 64), dtype) for dtype in ROUNDING}
    | {f"{dtype}, two chunks": _case((1, 1, 1, 2 * CHUNK, 16), dtype) for dtype in ROUNDING}
    | {
        "forgetting": _case((1, 2, 2, 200, 32), torch.float32, True, extreme=True),
        "large numbers": _case((1, 2, 1, 130, 32), torch.float32, True, 1e4),
        "values of another width": _case((1, 2, 1, 100, 40), torch.bfloat16, True, values=72),
    }
)


def _call(heads: int, key_heads: int, length: int, width: int, documents: bool) -> None:
    def empty(count: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(8, count, length, width, dtype=dtype, device="meta").requires_grad_()

    q, k, v, decay = empty(heads), empty(key_heads), empty(key_heads), empty(heads)
    ids = torch.empty(8, length, dtype=torch.int32, device="meta") if documents else None
    out = gated_linear(q, k, v, Mask(documents=ids), decay=decay)
    torch.autograd.grad(out, (q, k, v, decay), torch.empty_like(out))


SIZES = {
    "8 x 12 heads of 64 x 1,024": lambda: _call(12, 12, 1024, 64, False),
    "8 x 32 heads, 8 of keys, of 128 x 4,096": lambda: _call(32, 8, 4096, 128, True),
    "8 x 8 heads of 256 x 8,192": lambda: _call(8, 8, 8192, 256, False),
}


def _borders(length: int, chunk: int) -> int:
    """Rows of totals that are read at borders, of all sizes of halves and chunks of a line."""
    sizes = [1 << level for level in range(chunk.bit_length() - 1)]
    return sum(
        first + row // (2 * size) * (2 * size) + size - 1 < length
        for first in range(0, length, chunk)
        for row in range(chunk)
        for size in sizes
    )


class _Line:
    """What formulas of costs are made of: lines, their tokens and chunks, bytes of a number, blocks."""

    def __init__(self, launch: Launch) -> None:
        given = launch.arguments
        self.given, self.tokens, self.keys = given, given["length"], given["keys"]
        self.values = given.get("values", 0)
        self.totals = given["totals"]
        self.lines = self.totals.shape[0] * self.totals.shape[1]
        self.chunk = given["C"]
        self.chunks = -(-self.tokens // self.chunk)
        self.x = -(-self.keys // given["X"])
        self.z = -(-self.values // given["Z"]) if "Z" in given else 0
        self.documents = given.get("documents") is not None


def _totals(launch: Launch) -> Cost:
    numbers = launch.arguments["totals"].numel()
    return Cost(4 * numbers, 4 * numbers, once(launch), 0, numbers)


def _states(launch: Launch) -> Cost:
    at = _Line(launch)
    item = at.given["states"].element_size()
    read = at.lines * (at.tokens * at.keys * (item + 4) + 4 * at.chunks * at.keys) * at.z
    read += at.lines * at.tokens * at.values * item * at.x
    read += 4 * launch.programs * (at.tokens + 3 * at.chunks) * at.documents
    products = 2 * launch.programs * at.chunks * at.chunk * at.given["X"] * at.given["Z"]
    others = 3 * at.lines * at.tokens * at.keys * at.z
    return Cost(read, at.given["states"].numel() * item, once(launch), products, others)


def _weights(launch: Launch) -> Cost:
    at = _Line(launch)
    item = at.given["weights"].element_size()
    read = at.lines * at.keys * (at.tokens * (2 * item + 4) + 4 * _borders(at.tokens, at.chunk))
    read += 4 * at.lines * at.tokens * at.documents
    products = 2 * launch.programs * at.given["LEVELS"] * at.chunk**2 * at.x * at.given["X"]
    others = 5 * at.given["LEVELS"] * at.lines * at.tokens * at.keys
    return Cost(read, at.given["weights"].numel() * item, once(launch), products, others)


def _outputs(launch: Launch) -> Cost:
    at = _Line(launch)
    item = at.given["result"].element_size()
    ends = 4 * at.chunks * at.keys if at.given["BACK"] else 0
    read = at.lines * at.z * (at.tokens * (at.keys * (item + 4) + at.chunk * item) + ends)
    read += at.lines * (at.tokens * at.values + at.chunks * at.keys * at.values) * item
    read += 4 * at.lines * at.z * (at.tokens + at.chunks) * at.documents
    products = 2 * launch.programs * at.chunk * at.given["Z"] * (at.chunk + at.x * at.given["X"])
    others = 3 * at.lines * at.tokens * at.keys * at.z
    return Cost(read, at.given["result"].numel() * item, once(launch), products, others)


def _gradients(launch: Launch) -> Cost:
    at = _Line(launch)
    item = at.given["dq"].element_size()
    read = at.lines * 2 * (at.tokens * at.values * at.x + at.chunks * at.keys * at.values) * item
    read += (
        at.lines * at.keys * (at.tokens * (2 * item + 4) + 4 * (at.chunks + _borders(at.tokens, at.chunk)))
    )
    read += 4 * at.lines * at.x * (3 * at.tokens + 4 * at.chunks) * at.documents
    x, z, c = at.given["X"], at.z * at.given["Z"], at.chunk
    products = 2 * launch.programs * (c * c * z + 2 * c * z * x + 2 * at.given["LEVELS"] * c * c * x)
    others = 10 * at.given["LEVELS"] * at.lines * at.tokens * at.keys
    return Cost(read, at.totals.numel() * (2 * item + 4), once(launch), products, others)


COSTS = {
    "gated_linear_totals_kernel": _totals,
    "gated_linear_states_kernel": _states,
    "gated_linear_weights_kernel": _weights,
    "gated_linear_outputs_kernel": _outputs,
    "gated_linear_gradients_kernel": _gradients,
}
