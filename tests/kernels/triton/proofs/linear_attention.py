"""Causal linear attention: features of elu + 1, lessened ones, and ones of both signs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.kernels.attention.linear.linear import elu_features, quadratic
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.triton.linear_attention import linear_attention
from headway.kernels.triton.state_tiles import chunk_size
from headway.kernels.triton.workloads import linear_attention as workload
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, once, seed
from headway.tests.kernels.triton.roundings import Roundings, bounds

FLOOR = 0.3


def _case(
    shape: tuple[int, int, int, int, int, int],
    dtype: torch.dtype,
    documents: bool = False,
    kind: str = "elu",
    scale: float = 1.0,
) -> Case:
    """`shape`: B, H, K, S, M, D. `kind`: elu + 1; "lessened" by levels that rise by hundreds; "signed"; "empty": of
    some queries and keys all features are 0."""
    batch, heads, key_heads, length, features, width = shape

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())

        def normal(count: int, size: int) -> Tensor:  # heads after tokens, as projections have them
            return (torch.randn(batch, length, count, size, generator=draw) * scale).transpose(1, 2)

        q, k = normal(heads, features), normal(key_heads, features).contiguous()
        if kind != "signed":
            q, k = elu_features(q), elu_features(k)
        if kind == "empty":
            q, k = (x.masked_fill(torch.rand(x[..., :1].shape, generator=draw) < 0.3, 0) for x in (q, k))
        v, d = normal(key_heads, width), normal(heads, width)
        q, k, v, d = (x.to(dtype) for x in (q, k, v, d))
        mask = Mask(documents=documents_of(batch, length, draw) if documents else None)
        level = None
        if kind == "lessened":
            level = (normal(key_heads, 1)[..., 0].abs() * 5).cumsum(-1)
        floor = FLOOR if kind == "signed" else 0
        ours = [x.to(device).requires_grad_() for x in (q, k, v)]
        here = mask._replace(documents=None if mask.documents is None else mask.documents.to(device))
        out = linear_attention(*ours, here, None if level is None else level.to(device), floor)
        found = [out, *torch.autograd.grad(out, ours, d.to(device))]
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        decay = _decay(level, mask, heads, length)
        wanted_out = _reference(*wide, mask, decay, floor)
        wanted = [wanted_out, *torch.autograd.grad(wanted_out, wide, d.double())]
        # fp32 sums one after another: of as many terms as tokens, features or values.
        far = bounds(
            lambda moved, x: _stages(moved, decay, floor, *x),
            (q, k, v, d),
            dtype,
            max(length, features, width),
            draw,
        )
        names = "out", "dq", "dk", "dv"
        return {name: Result(*row) for name, *row in zip(names, found, wanted, far, strict=True)}

    return compute


def documents_of(batch: int, length: int, draw: torch.Generator) -> Tensor:
    """Contiguous documents of drawn lengths, the last of which is padding."""
    begins = torch.rand(batch, length, generator=draw) < 0.05
    documents = begins.cumsum(1)
    return documents.masked_fill(torch.arange(length) >= length - 3, -1)


def _decay(level: Tensor | None, mask: Mask, heads: int, length: int) -> Tensor:
    """exp(level_j - level_t) of keys that queries see, fp64 [B or 1, H or 1, S, S]."""
    seen = lower(mask, length, length, torch.device("cpu"))
    if level is None:
        return torch.ones(length, length).double().masked_fill(~seen, 0)
    wide = level.double().repeat_interleave(heads // level.shape[1], 1)
    return (wide[..., None, :] - wide[..., None]).masked_fill(~seen, -torch.inf).exp()


def _reference(q: Tensor, k: Tensor, v: Tensor, mask: Mask, decay: Tensor, floor: float) -> Tensor:
    if decay.dim() == 2 or decay.shape[1] == 1:
        return quadratic(q, k, v, mask, floor)
    group = q.shape[1] // k.shape[1]
    weights = q @ k.repeat_interleave(group, 1).mT * decay
    total = weights.sum(-1, keepdim=True)
    return weights @ v.repeat_interleave(group, 1) / total.masked_fill(total == 0, 1)


def _stages(
    moved: Roundings, decay: Tensor, floor: float, q: Tensor, k: Tensor, v: Tensor, d: Tensor
) -> list[Tensor]:
    """out, dq, dk, dv by the kernels' formulas, with what they round: products, weights, results and slopes. A state's
    numbers are rounded in the place of the products that it holds."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(group, 1) for x in (k, v))
    weights = moved(q @ keys.mT) * decay
    z = weights.sum(-1, keepdim=True)
    moves = z >= floor if floor else z != 0
    z = z.clamp(min=floor) if floor else z.masked_fill(z == 0, 1)
    out = moved(moved(weights) @ values / z)
    lean = moved((d * out).sum(-1, keepdim=True)) * moves
    slopes = moved((moved(d @ values.mT) - lean) * decay / z)
    dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (slopes.mT @ q, moved(weights / z).mT @ d))
    return [out, moved(slopes @ keys), moved(dk), moved(dv)]


_WIDTHS = ((40, 40), (64, 80), (80, 128), (128, 256), (256, 64))
_NAMES = {torch.bfloat16: "bf16", torch.float32: "fp32"}
OFTEN = ("fp32, lessened", "bf16, empty")
CASES: dict[str, Case] = (
    {"bf16, documents": _case((1, 2, 1, 70, 40, 40), torch.bfloat16, True)}
    | {
        f"{name}, {m} features, {d} wide": _case((1, 2, 1, 70, m, d), dtype, dtype == torch.float32)
        for dtype, name in _NAMES.items()
        for m, d in _WIDTHS
    }
    | {f"{name}, one row": _case((1, 1, 1, 1, 64, 64), dtype) for dtype, name in _NAMES.items()}
    | {
        f"{name}, a chunk": _case((1, 1, 1, chunk_size(dtype), 16, 16), dtype)
        for dtype, name in _NAMES.items()
    }
    | {f"{name}, three chunks": _case((2, 1, 1, 150, 16, 16), dtype) for dtype, name in _NAMES.items()}
    | {
        f"{name}, {kind}": _case((1, 2, 1, 70, 40, 64), dtype, True, kind)
        for dtype, name in _NAMES.items()
        for kind in ("lessened", "empty")
    }
    | {
        f"{name}, large numbers": _case((1, 2, 2, 100, 40, 40), dtype, True, scale=1e4)
        for dtype, name in _NAMES.items()
    }
    | {"signed": _case((1, 2, 2, 100, 40, 40), torch.float32, True, "signed", 0.1)}
)


META = torch.device("meta")
COMPILED = {
    f"{name}, {features} features, {width} wide, documents": partial(
        workload.call, META, 4, 2, 1024, features, width, True, dtype
    )
    for dtype, name in _NAMES.items()
    for features, width in ((32, 32), (64, 64), (80, 80), (128, 256), (256, 128))
}


def _joints(given: Mapping[str, Any]) -> int:
    """How many of documents and levels there are."""
    return (given["level"] is not None) + (given["documents"] is not None)


def _states(launch: Launch) -> Cost:
    given = launch.arguments
    length, m, d = (given[x] for x in ("length", "features", "width"))
    x, states = given["x"].data, given["states"]
    lines, chunks, item = states.shape[0] * states.shape[1], states.shape[2], x.element_size()
    rows, columns = -(-m // given["X"]), -(-d // given["Z"])
    back = given["inverse"] is not None
    members = given["group"] if back else 1
    read = lines * members * length * (m * columns + d * rows) * item
    read += launch.programs * 4 * (length + 3 * chunks) * _joints(given)
    read += launch.programs * 4 * length * members * 2 * back
    products = launch.programs * members * chunks * 2 * given["X"] * given["Z"] * given["C"]
    written = states.numel() * item + given["sums"].numel() * 4
    return Cost(read, written, once(launch), products, 3 * lines * members * length * m * columns)


def _outputs(launch: Launch) -> Cost:
    given = launch.arguments
    length, x, z, what, c = (given[name] for name in ("length", "summed", "columns", "WHAT", "C"))
    result = given["result"].data
    lines, item, chunks = result.shape[0] * result.shape[1], result.element_size(), -(-length // c)
    blocks = -(-z // given["Z"])
    members = given["group"] if what in ("dk", "dv") else 1
    read = lines * members * length * item * (2 * x * blocks + z) + lines * chunks * x * z * item
    read += {"out": launch.programs * x, "dq": lines * chunks * z, "dk": lines * chunks * z, "dv": 0}[
        what
    ] * 4
    numbers = {"out": 0, "dq": 3, "dk": 2 * members, "dv": members}[what]
    read += 4 * lines * blocks * (numbers * length + _joints(given) * (2 * length + chunks))
    written = result.numel() * item + (4 * lines * length if what == "out" else 0)
    summed = -(-x // given["X"]) * given["X"]
    products = 2 * launch.programs * c * (members * c * (summed + given["Z"]) + summed * given["Z"])
    return Cost(read, written, once(launch), products, 6 * launch.programs * members * c * c)


def _rows(launch: Launch) -> Cost:
    out = launch.arguments["out"].data
    rows = out.numel() // out.shape[-1]
    return Cost(2 * out.numel() * out.element_size() + 4 * rows, 8 * rows, once(launch), 0, 2 * out.numel())


COSTS = {
    "linear_attention_states_kernel": _states,
    "linear_attention_outputs_kernel": _outputs,
    "linear_attention_rows_kernel": _rows,
}
