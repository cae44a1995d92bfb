"""Grouped products."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels import grouped
from headway.kernels.triton.grouped import linear
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(
    counts: tuple[int, ...],
    widths: tuple[int, int],
    dtype: torch.dtype,
    rest: int = 0,
    bias: bool = False,
    weights: torch.dtype | None = None,
    scale: float = 1.0,
) -> Case:
    """Groups of so many rows; `rest` more that are in none, and hold what is no number."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        inner, outer = widths
        rows = sum(counts)
        kind = weights or dtype
        x, d_y = (drawn(draw, rows, width, dtype=dtype).detach() * scale for width in widths)
        given = {"x": x, "w": drawn(draw, len(counts), outer, inner, dtype=kind).detach()}
        if bias:
            given["bias"] = drawn(draw, len(counts), outer, dtype=kind).detach()
        ends = torch.tensor(counts).cumsum(0)
        ours = {name: value.clone().to(device).requires_grad_() for name, value in given.items()}
        y = linear(_padded(ours["x"], rest), ours["w"], ours.get("bias"), ends.to(device))
        found = torch.autograd.grad(y, list(ours.values()), _padded(d_y.to(device), rest))
        wide = {name: value.double() for name, value in given.items()}
        if kind != dtype:
            wide["w"] = given["w"].to(dtype).double()  # as products take it
        wide = {name: value.requires_grad_() for name, value in wide.items()}
        y_64 = grouped.linear(wide["x"], wide["w"], wide.get("bias"), ends)
        wanted = torch.autograd.grad(y_64, list(wide.values()), d_y.double())
        tops = {name: _top(value) for name, value in (given | {"d_y": d_y}).items()}
        # A sum of n products has n roundings, of partial sums no larger than n times the largest.
        sizes = {
            "x": outer * tops["d_y"] * tops["w"],
            "w": max(counts) * tops["d_y"] * tops["x"],
            "bias": max(counts) * tops["d_y"],
        }
        terms = {"x": outer, "w": max(counts), "bias": max(counts)}
        filled = torch.cat((y_64, y_64.new_zeros(rest, outer)))
        size = inner * tops["x"] * tops["w"] + tops.get("bias", 0.0)
        results = {"y": Result(y, filled, _tolerance(y_64, dtype, size, inner))}
        for name, d, d_64 in zip(given, found, wanted, strict=True):
            results[f"d_{name}"] = Result(d, d_64, _tolerance(d_64, d.dtype, sizes[name], terms[name]))
        return results

    return compute


def _top(x: Tensor) -> float:
    return float(x.detach().abs().max())


def _padded(x: Tensor, rest: int) -> Tensor:
    return torch.cat((x, x.new_full((rest, x.shape[1]), float("nan"))))


def _tolerance(wanted: Tensor, dtype: torch.dtype, size: float, terms: int) -> float:
    """Rounded once to the dtype, after random roundings of partial sums in fp32: a root of their number."""
    return _top(wanted) * ROUNDING[dtype] + size * terms**0.5 * 2.0**-24


OFTEN = ("rows in no group, bf16", "uneven, fp16")
CASES: dict[str, Case] = {
    "one row, fp32": _case((1,), (40, 24), torch.float32),
    "uneven, fp32": _case((70, 0, 3, 130), (40, 80), torch.float32, bias=True),
    "uneven, bf16": _case((70, 0, 3, 130), (40, 80), torch.bfloat16, bias=True),
    "odd widths, bf16": _case((5, 66), (37, 129), torch.bfloat16),
    "odd widths, fp32": _case((5, 66), (37, 67), torch.float32, bias=True),
    "rows in no group, fp32": _case((9, 30), (24, 40), torch.float32, rest=80, bias=True),
    "rows in no group, bf16": _case((9, 30), (64, 40), torch.bfloat16, rest=21),
    "many groups": _case((3, 0, 0, 1, 64, 65, 0, 2, 1), (16, 16), torch.float32, bias=True),
    "rows in one group, the last, fp32": _case((0, 0, 7), (24, 40), torch.float32, rest=5),
    "wide weights, bf16": _case((33, 12), (40, 64), torch.bfloat16, bias=True, weights=torch.float32),
    "many tiles": _case((600, 40), (16, 140), torch.float32),
    "large numbers": _case((33, 12), (40, 64), torch.float32, scale=1e4),
    "uneven, fp16": _case((70, 0, 3, 130), (40, 80), torch.float16, bias=True),
}


def _counts(launch: Launch, groups: int, rows: int) -> list[int]:
    """Rows of groups; as many each, where they are not known."""
    ends = launch.arguments["ends"]
    if ends.is_meta:
        return [rows // groups] * groups
    found: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return found


def _product(launch: Launch) -> Cost:
    given = launch.arguments
    rows, groups, inner, outer = (given[name] for name in ("rows", "groups", "inner", "outer"))
    m, n, k = (given[name] for name in "MNK")
    counts, blocks, item = _counts(launch, groups, rows), -(-outer // n), given["x"].element_size()
    tiles = sum(-(-count // m) for count in counts)
    read = launch.programs * groups * 16 + (sum(counts) * blocks + tiles * outer) * inner * item
    if given["bias"] is not None:
        read += tiles * outer * given["bias"].element_size()
    products = 2 * tiles * blocks * -(-inner // k) * m * n * k
    return Cost(read, rows * outer * item, once(launch), products, rows * outer)


def _weight(launch: Launch) -> Cost:
    given = launch.arguments
    inner, outer, m, n, k = (given[name] for name in ("inner", "outer", "M", "N", "K"))
    groups, item = len(given["ends"]), given["x"].element_size()
    counts = _counts(launch, groups, len(given["x"]))
    n_blocks, k_blocks = -(-outer // n), -(-inner // k)
    read = sum(counts) * (outer * k_blocks + inner * n_blocks) * item
    read += n_blocks * k_blocks * (2 * groups - 1) * 8
    products = 2 * sum(-(-count // m) for count in counts) * n_blocks * k_blocks * m * n * k
    written = groups * inner * outer * given["d_w"].element_size()
    return Cost(read, written, once(launch), products, 0)


def _bias(launch: Launch) -> Cost:
    given = launch.arguments
    outer, groups = given["outer"], len(given["ends"])
    rows = sum(_counts(launch, groups, len(given["d_y"])))
    read = rows * outer * given["d_y"].element_size() + -(-outer // given["N"]) * (2 * groups - 1) * 8
    return Cost(read, groups * outer * given["d_bias"].element_size(), once(launch), 0, rows * outer)


COSTS = {
    "grouped_product_kernel": _product,
    "grouped_weight_kernel": _weight,
    "grouped_bias_kernel": _bias,
}
