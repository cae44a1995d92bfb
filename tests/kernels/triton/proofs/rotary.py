"""Rotary position embedding of queries and keys."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels.rotary import Rotation, rotation
from headway.kernels.rotary import rotate as reference
from headway.kernels.triton.rotary import rotate
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(
    heads: tuple[int, int],
    places: tuple[int, int],
    dim: int,
    dtype: torch.dtype,
    layout: str = "projected",
    batched: bool = False,
    scale: float = 1.0,
) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        batch = 2
        positions = torch.randint(
            0, 10_000, (batch, max(places)) if batched else (max(places),), generator=draw
        )
        turn = rotation(positions, dim, 10_000.0)
        given: list[Tensor] = []
        slopes: list[Tensor] = []
        for count, length in zip(heads, places, strict=True):
            shape = (batch, length, count, dim) if layout == "projected" else (batch, count, length, dim)
            x, d = (drawn(draw, *shape, dtype=dtype).detach() * scale for _ in range(2))
            given.append(x.transpose(1, 2) if layout == "projected" else x)
            slopes.append(d if layout == "plain" else d.view(batch, count, length, dim))
        if layout == "features first":
            given = [x.mT.contiguous().mT for x in given]
        ours = [x.to(device).requires_grad_() for x in given]
        turned = rotate(*ours, Rotation(*(t.to(device) for t in turn)))
        found = torch.autograd.grad(turned, ours, [d.to(device) for d in slopes])
        results = {}
        for name, x, d, y, d_x in zip("qk", given, slopes, turned, found, strict=True):
            wide = x.double().requires_grad_()
            own = Rotation(*(t[..., : x.shape[2], :].double() for t in turn))
            y_64 = reference(wide, own)
            (d_64,) = torch.autograd.grad(y_64, wide, d.double())
            results[name] = Result(y, y_64, _tolerance(x, dtype))
            results[f"d_{name}"] = Result(d_x, d_64, _tolerance(d, dtype))
        return results

    return compute


def _tolerance(x: Tensor, dtype: torch.dtype) -> float:
    """Two products and a sum, none above sqrt(2) max |x|, rounded in fp32 and once to the dtype."""
    return 2**0.5 * float(x.detach().abs().max()) * (ROUNDING[dtype] + 4 * 2.0**-24)


OFTEN = ("fp16", "features first, which is copied")
CASES: dict[str, Case] = {
    f"{heads} heads, {places} places, {dim}, {dtype}": _case(heads, places, dim, dtype)
    for (heads, places, dim) in (
        ((1, 1), (1, 1), 40),
        ((4, 4), (37, 37), 64),
        ((6, 2), (19, 19), 80),
        ((5, 1), (7, 33), 128),
        ((3, 3), (9, 9), 256),
    )
    for dtype in (torch.float32, torch.bfloat16)
} | {
    "heads first": _case((4, 2), (21, 21), 64, torch.bfloat16, "plain"),
    "features first, which is copied": _case((3, 2), (21, 21), 40, torch.float32, "features first"),
    "places of every sample": _case((4, 2), (21, 13), 64, torch.float32, batched=True),
    "large numbers": _case((4, 2), (21, 21), 64, torch.float32, scale=1e4),
    "fp16": _case((4, 2), (21, 21), 80, torch.float16),
}


def _cost(launch: Launch) -> Cost:
    given = launch.arguments
    x = sum(given[name].data.numel() * given[name].data.element_size() for name in "qk")
    count = sum(given[name].data.numel() for name in "qk")
    angles = given["q"].data.shape[0] * given["places"] * given["half"] * 2 * given["cos"].element_size()
    return Cost(x + angles, x, once(launch), 0, 3 * count)


COSTS = {"rotary_kernel": _cost}
