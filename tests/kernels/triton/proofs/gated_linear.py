"""Gated linear attention, beside the recurrence token by token in fp64."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from headway.kernels.attention.linear.gated import TEMPERATURE, log_decay, reference
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.triton.gated_linear import gated_linear
from headway.kernels.triton.state_tiles import chunk_size
from headway.kernels.triton.workloads import gated_linear as workload
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, once, seed
from headway.tests.kernels.triton.proofs.linear_attention import documents_of
from headway.tests.kernels.triton.roundings import Roundings, bounds


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

        def normal(count: int, size: int) -> Tensor:  # heads after tokens, as projections have them
            return (torch.randn(batch, length, count, size, generator=draw) * scale).to(dtype).transpose(1, 2)

        q, k = normal(heads, width), normal(key_heads, width).contiguous()
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
        chunk = chunk_size(dtype)
        far = bounds(
            lambda moved, x: _stages(moved, mask, chunk, *x),
            (*given, d),
            dtype,
            max(length, width, chunk),
            draw,
        )
        names = "out", "dq", "dk", "dv", "d_decay"
        return {name: Result(*row) for name, *row in zip(names, found, wanted, far, strict=True)}

    return compute


def _reference(mask: Mask, *given: Tensor) -> list[Tensor]:
    """Output and gradients, in fp64, of q, k, v, gates, and the gradient of the output."""
    *wide, d = (x.detach().double().requires_grad_() for x in given)
    out = reference(*wide[:3], mask, decay=wide[3])
    return [out.detach(), *torch.autograd.grad(out, wide, d.detach())]


def _stages(
    moved: Roundings, mask: Mask, chunk: int, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, d: Tensor
) -> list[Tensor]:
    """Output and gradients of q, k, v and gates by the kernels' formulas, with what they round: decayed queries and
    keys, weights, slopes, results, and sums of logarithms from each chunk's start. A state's numbers are rounded in the
    place of the weights that it holds."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    logs = log_decay(decay)
    total = logs.cumsum(2)
    off = torch.cat([moved.sums(x.cumsum(2)) for x in logs.split(chunk, 2)], 2)
    apart = total[:, :, :, None] - total[:, :, None]
    seen = lower(mask, length, length, torch.device("cpu"))
    factor = apart.masked_fill(~seen[..., None], -torch.inf).exp() * q.shape[3] ** -0.5
    factor = factor * (1 + off[:, :, :, None] - off[:, :, None])
    asks, gives = moved(q[:, :, :, None] * factor), moved(keys[:, :, None] * factor)
    weights = moved((asks * keys[:, :, None]).sum(-1))
    slopes = moved(d @ values.mT)[..., None]
    dq, dk = (slopes * gives).sum(3), (slopes * asks).sum(2)
    d_total = moved(q * dq) - moved(keys * dk)
    d_decay = d_total.flip(2).cumsum(2).flip(2) * (-decay).sigmoid() / TEMPERATURE
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (moved(dk), moved(weights.mT @ d)))
    return [moved(weights @ values), moved(dq), moved(dk), moved(dv), d_decay]


_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
OFTEN = ("fp32, large numbers", "forgetting")
CASES: dict[str, Case] = (
    {"bf16, documents": _case((1, 1, 1, 70, 24), torch.bfloat16, True)}
    | {
        f"{name}, {width} wide": _case((1, heads, 1, 70, width), dtype, dtype == torch.float32)
        for dtype, name in _NAMES.items()
        for heads, width in ((2, 40), (2, 64), (2, 80), (1, 128), (1, 256))
    }
    | {f"{name}, one row": _case((1, 1, 1, 1, 64), dtype) for dtype, name in _NAMES.items()}
    | {f"{name}, a chunk": _case((1, 1, 1, chunk_size(dtype), 16), dtype) for dtype, name in _NAMES.items()}
    | {f"{name}, three chunks": _case((2, 1, 1, 150, 16), dtype) for dtype, name in _NAMES.items()}
    | {f"{name}, large numbers": _case((1, 2, 1, 70, 32), dtype, True, 1e4) for dtype, name in _NAMES.items()}
    | {
        "forgetting": _case((1, 2, 2, 100, 32), torch.float32, True, extreme=True),
        "values of another width": _case((1, 2, 1, 70, 40), torch.bfloat16, True, values=72),
    }
)


META = torch.device("meta")
COMPILED = {
    "fp32": lambda: workload.call(META, 4, 2, 1024, 64, True, torch.float32),
    "fp32, 256 wide": lambda: workload.call(META, 4, 4, 1024, 256, True, torch.float32),
    "bf16, 256 wide, documents": lambda: workload.call(META, 4, 4, 1024, 256, True),
} | {
    f"{name}, {width} wide, documents": partial(workload.call, META, 4, 2, 1024, width, True, dtype)
    for dtype, name in _NAMES.items()
    for width in (32, 80, 128)
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
