"""LayerNorm and RMSNorm with a residual."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.triton.norm import norm
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed

EPS = 1e-5
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(
    rows: int, width: int, dtype: torch.dtype, centred: bool, residual: bool, scale: float = 1.0
) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        shape = rows, width
        x, r, d_y, d_u = ((drawn(draw, *shape, dtype=dtype) * scale).detach() for _ in range(4))
        weight, bias = (drawn(draw, width).detach() for _ in range(2))
        given = {"x": x, "weight": weight} | ({"bias": bias} if centred else {})
        given |= {"residual": r} if residual else {}
        ours = {name: value.to(device).requires_grad_() for name, value in given.items()}
        y, total = norm(**ours, eps=EPS, centred=centred)
        outputs = [y, total] if residual else [y]
        slopes = [d.to(device) for d in (d_y, d_u)][: len(outputs)]
        found = dict(zip(given, torch.autograd.grad(outputs, list(ours.values()), slopes), strict=True))
        wide = {name: value.double().requires_grad_() for name, value in given.items()}
        y_64, total_64 = _reference(wide, centred, dtype)
        outputs_64 = [y_64, total_64] if residual else [y_64]
        slopes_64 = [d.double() for d in (d_y, d_u)][: len(outputs)]
        wanted = dict(
            zip(given, torch.autograd.grad(outputs_64, list(wide.values()), slopes_64), strict=True)
        )
        results = {"y": Result(y, y_64, _tolerance(y_64, dtype))}
        results |= {"total": Result(total, total_64, _tolerance(total_64, dtype))} if residual else {}
        for name in given:
            # Sums over rows have terms of both signs: their rounding is that of the sum of absolute values.
            size = rows**0.5 if name in ("weight", "bias") else 1.0
            kind = torch.float32 if name in ("weight", "bias") else dtype
            tolerance = _tolerance(wanted[name], kind) + 64 * 2.0**-24 * size * float(d_y.abs().max())
            results[f"d_{name}"] = Result(found[name], wanted[name], tolerance)
        return results

    return compute


def _tolerance(wanted: Tensor, dtype: torch.dtype) -> float:
    """Rounded once to the dtype, after some sixteen roundings in fp32 of numbers no larger."""
    return float(wanted.detach().abs().max()) * (ROUNDING[dtype] + 16 * 2.0**-24)


def _reference(given: dict[str, Tensor], centred: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    u = given["x"] + given["residual"] if "residual" in given else given["x"]
    u = u + (u.detach().to(dtype).double() - u.detach())  # as it is kept
    if centred:
        return F.layer_norm(u, u.shape[-1:], given["weight"], given["bias"], EPS), u
    return F.rms_norm(u, u.shape[-1:], given["weight"], EPS), u


_KINDS = list(itertools.product((torch.float32, torch.bfloat16), (False, True), (False, True)))
OFTEN = ("67 x 80, fp16", "large numbers")
CASES: dict[str, Case] = {
    f"{rows} x {width}, {dtype}, {'layer' if centred else 'rms'}{', residual' if residual else ''}": _case(
        rows, width, dtype, centred, residual
    )
    for (rows, width) in ((1, 40), (67, 80), (300, 128), (5, 1000))
    for dtype, centred, residual in _KINDS
} | {
    "large numbers": _case(9, 256, torch.float32, True, True, 1e4),
    "small numbers": _case(9, 256, torch.float32, False, True, 1e-4),
    "67 x 80, fp16": _case(67, 80, torch.float16, True, True),
}


def _forward(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["x"].element_size()
    kept = 8 if given["mean"] is not None else 4
    weights = width * given["weight"].element_size() * (2 if given["bias"] is not None else 1)
    added = given["residual"] is not None
    read = rows * width * item * (1 + added) + launch.programs * weights
    written = rows * width * (given["y"].element_size() + item * added) + rows * kept
    return Cost(read, written, once(launch) - (0 if added else rows * width * item), 0, 10 * rows * width)


def _backward(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["total"].element_size()
    kept = 8 if given["mean"] is not None else 4
    flows = 2 + (given["d_total"] is not None)
    read = rows * (width * item * flows + kept) + launch.programs * width * given["weight"].element_size()
    sums = launch.programs * width * 4 * (2 if given["d_bias"] is not None else 1)
    return Cost(read, rows * width * item + sums, once(launch), 0, 16 * rows * width)


COSTS = {"norm_forward_kernel": _forward, "norm_backward_kernel": _backward}
