"""Activations, gated and plain, with biases."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels.glu import GATED, PLAIN
from headway.kernels.triton.glu import activate, glu
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(
    rows: int,
    width: int,
    dtype: torch.dtype,
    name: str,
    biases: str = "",
    scale: float = 1.0,
    packed: bool = False,
) -> Case:
    """`biases`: of gate and up, `g` and `u`. `packed`: gate and up are halves of one tensor."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        gate, up, d_y = (drawn(draw, rows, width, dtype=dtype).detach() for _ in range(3))
        given = {"gate": gate * scale} | ({"up": up} if name in GATED else {})
        for which in biases:
            given[{"g": "gate_bias", "u": "up_bias"}[which]] = drawn(draw, width).detach()
        ours = {what: value.clone().to(device).requires_grad_() for what, value in given.items()}
        passed = dict(ours)
        if packed:
            passed["gate"], passed["up"] = torch.cat((ours["gate"], ours["up"]), -1).chunk(2, -1)
        y = _ours(passed, name)
        found = torch.autograd.grad(y, list(ours.values()), d_y.to(device))
        wide = {what: value.double().requires_grad_() for what, value in given.items()}
        y_64 = _reference(wide, name)
        wanted = torch.autograd.grad(y_64, list(wide.values()), d_y.double())
        # Errors of exp and erf, of a few units, are absolute errors of f and f' that grow with |x| and other factors:
        # their largest, of y's or gradients' terms, each rounded some thirty times.
        size = _size(given, d_y)
        results = {"y": Result(y, y_64, _tolerance(y_64, dtype) + 32 * 2.0**-24 * size)}
        for what, d, d_64 in zip(given, found, wanted, strict=True):
            summed = rows**0.5 if "bias" in what else 1.0  # terms of both signs
            kind = torch.float32 if "bias" in what else dtype
            results[f"d_{what}"] = Result(d, d_64, _tolerance(d_64, kind) + 64 * 2.0**-24 * summed * size)
        return results

    return compute


def _ours(given: Mapping[str, Tensor], name: str) -> Tensor:
    if name in GATED:
        return glu(given["gate"], given["up"], name, given.get("gate_bias"), given.get("up_bias"))
    return activate(given["gate"], name, given.get("gate_bias"))


def _reference(given: Mapping[str, Tensor], name: str) -> Tensor:
    gate = given["gate"] + given.get("gate_bias", 0)
    if name in GATED:
        return GATED[name](gate, given["up"] + given.get("up_bias", 0))
    return PLAIN[name](gate)


def _size(given: Mapping[str, Tensor], d_y: Tensor) -> float:
    """A bound of every factor's largest product: (1 + |gate|) (1 + |up|) (1 + |dy|), with biases."""
    size = 1 + float(d_y.abs().max())
    for what in ("gate", "up"):
        if what in given:
            bias = float(given[f"{what}_bias"].abs().max()) if f"{what}_bias" in given else 0.0
            size *= 1 + float(given[what].abs().max()) + bias
    return size


def _tolerance(wanted: Tensor, dtype: torch.dtype) -> float:
    """Rounded once to the dtype."""
    return float(wanted.detach().abs().max()) * ROUNDING[dtype]


_SHAPES = ((1, 40), (67, 80), (150, 200))
OFTEN = ("fp16, gated", "wide")
CASES: dict[str, Case] = {
    f"{rows} x {width}, {name}, {dtype}{', biases' if biases else ''}": _case(rows, width, dtype, name, biases)
    for (rows, width), name, dtype, biases in itertools.product(
        _SHAPES, GATED, (torch.float32, torch.bfloat16), ("", "gu")
    )
} | {
    f"{rows} x {width}, {name}, {dtype}, bias": _case(rows, width, dtype, name, "g")
    for (rows, width), (name, dtype) in zip(
        itertools.cycle(_SHAPES), itertools.product(PLAIN, (torch.float32, torch.bfloat16)), strict=False
    )
} | {
    "wide": _case(3, 1030, torch.bfloat16, "swiglu", "u"),
    "halves of one product": _case(21, 48, torch.float32, "geglu", packed=True),
    "no bias": _case(21, 48, torch.float32, "gelu"),
    "fp16, gated": _case(21, 48, torch.float16, "swiglu", "gu"),
    "fp16": _case(21, 48, torch.float16, "gelu", "g"),
    **{f"large numbers, {name}": _case(9, 64, torch.float32, name, scale=1e4) for name in (*GATED, *PLAIN)},
}  # fmt: skip


def _biases(given: Mapping[str, Tensor | None], rows: int) -> int:
    """Bytes that tiles of so many programs a column read of biases."""
    found = (given["gate_bias"], given["up_bias"])
    return sum(rows * bias.numel() * bias.element_size() for bias in found if bias is not None)


def _forward(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["gate"].element_size()
    inputs = 1 if given["up"] is None else 2
    read = inputs * rows * width * item + _biases(given, -(-rows // given["R"]))
    return Cost(read, rows * width * item, once(launch), 0, 12 * rows * width)


def _backward(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["gate"].element_size()
    inputs = 1 if given["up"] is None else 2
    strips = launch.programs // -(-width // given["C"])
    read = (1 + inputs) * rows * width * item + _biases(given, strips)
    parts = sum(given[name].numel() * 4 for name in ("d_gate_bias", "d_up_bias") if given[name] is not None)
    return Cost(read, inputs * rows * width * item + parts, once(launch), 0, 24 * rows * width)


COSTS = {"glu_forward_kernel": _forward, "glu_backward_kernel": _backward}
