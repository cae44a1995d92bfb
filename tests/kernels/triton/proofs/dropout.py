"""A bias, dropout and a residual sum."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels import dropout as plain
from headway.kernels import random
from headway.kernels.triton.dropout import dropout
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    parts: str = "",
    p: float = 0.1,
    mixed: bool = False,
    rows_of_batch: bool = False,
    scale: float = 1.0,
) -> Case:
    """`parts`: `b`, a bias, and `r`, a residual, of fp32 if `mixed`."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        batch, places, width = shape
        x, d_y = (drawn(draw, *shape, dtype=dtype).detach() * scale for _ in range(2))
        given = {"x": x}
        if "b" in parts:
            given["bias"] = drawn(draw, width).detach()
        if "r" in parts:
            given["residual"] = drawn(draw, *shape, dtype=torch.float32 if mixed else dtype).detach()
        key = torch.tensor(random.key(seed(), "dropout", p))
        slot = torch.randint(0, 2**32, (batch, 1), generator=draw)
        position = torch.randint(0, 2**32, (batch if rows_of_batch else 1, places), generator=draw)
        ours = {name: value.clone().to(device).requires_grad_() for name, value in given.items()}
        more = {name: value for name, value in ours.items() if name != "x"}
        coordinates = slot.to(device), position.to(device), 0
        y = dropout(ours["x"], p, key.to(device), coordinates, **more)
        found = torch.autograd.grad(y, list(ours.values()), d_y.to(device, y.dtype))
        wide = {name: value.double().requires_grad_() for name, value in given.items()}
        inner = wide["x"] + wide.get("bias", 0)
        y_64 = plain.dropout(inner, p, key, (slot, position, 0)) + wide.get("residual", 0)
        wanted = torch.autograd.grad(y_64, list(wide.values()), d_y.double())
        kind = torch.float32 if mixed else dtype
        results = {"y": Result(y, y_64, _tolerance(y_64, kind))}
        if not more:
            # Not a bit of a mask may be another: an element of a normal draw is 0 where it is dropped alone.
            results["mask"] = Result((y == 0).double(), (y_64 == 0).double(), 0.0)
        for name, d, d_64 in zip(given, found, wanted, strict=True):
            summed = float(d_y.abs().sum((0, 1)).max()) / (1 - p) * 2.0**-24 * 16 if name == "bias" else 0.0
            results[f"d_{name}"] = Result(
                d, d_64, _tolerance(d_64, kind if name == "residual" else d.dtype) + summed
            )
        return results

    return compute


def _tolerance(wanted: Tensor, dtype: torch.dtype) -> float:
    """Rounded once to the dtype, after three roundings in fp32 of numbers that are not much larger."""
    return float(wanted.detach().abs().max()) * (ROUNDING[dtype] + 6 * 2.0**-24)


OFTEN = ("fp16", "an odd width")
CASES: dict[str, Case] = {
    f"{shape}, {dtype}, {parts or 'x alone'}": _case(shape, dtype, parts)
    for shape, dtype, parts in itertools.product(
        ((1, 1, 40), (2, 35, 80), (3, 50, 300)), (torch.float32, torch.bfloat16), ("", "b", "r", "br")
    )
} | {
    "an odd width": _case((2, 9, 37), torch.float32),
    "places of every sample": _case((3, 21, 64), torch.float32, rows_of_batch=True),
    "a wide residual": _case((2, 21, 64), torch.bfloat16, "r", mixed=True),
    "half": _case((2, 21, 64), torch.float32, p=0.5),
    "nearly all": _case((2, 21, 64), torch.float32, p=0.99),
    "nothing dropped": _case((2, 21, 64), torch.float32, "br", p=0.0),
    "large numbers": _case((2, 21, 64), torch.float32, "br", scale=1e4),
    "fp16": _case((2, 21, 64), torch.float16, "br"),
}

PHILOX = 14
"""Operations of an element: a hundred and some of a call, shared by eight."""


def _forward(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["x"].element_size()
    blocks = -(-width // given["C"])
    read = rows * width * item + rows * blocks * 16 + launch.programs * 8
    if given["bias"] is not None:
        read += launch.programs // blocks * width * given["bias"].element_size()
    if given["residual"] is not None:
        read += rows * width * given["residual"].element_size()
    written = rows * width * given["y"].element_size()
    return Cost(read, written, once(launch), 0, (3 + PHILOX) * rows * width)


def _backward(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["d_y"].element_size()
    blocks = -(-width // given["C"])
    read = rows * width * item + rows * blocks * 16 + launch.programs * 8
    sums = launch.programs // blocks * width * 4 if given["d_bias"] is not None else 0
    written = rows * width * given["d_x"].element_size() + sums
    return Cost(read, written, once(launch), 0, (2 + PHILOX) * rows * width)


COSTS = {"dropout_forward_kernel": _forward, "dropout_backward_kernel": _backward}
