"""LAMB of many tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels.triton.lamb import lamb
from headway.pretrain.optim.lamb import Lamb
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, once
from headway.tests.kernels.triton.tensor_lists import (
    ROUNDING,
    Drawn,
    drawn_lists,
    elements,
    flat,
    itemsize,
    shifted,
)

HOW = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


def _case(
    param: torch.dtype,
    grad: torch.dtype,
    moment: torch.dtype,
    *,
    copy: torch.dtype | None = None,
    scaled: float | None = None,
    found_inf: float | None = None,
    adapt: bool = True,
    size: float = 1.0,
    zeros: bool = False,
    odd: bool = False,
) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        given = drawn_lists(param, grad, moment, size)
        if zeros:  # a tensor of zeros, and one that nothing moves
            given.params[0].zero_()
            for tensors in (given.params, given.grads, given.exp_avgs):
                tensors[1].zero_()
        ours = given.on(device)
        if odd:
            ours = {name: [shifted(x) for x in tensors] for name, tensors in ours.items()}
        copies = None if copy is None else [torch.empty_like(x, dtype=copy) for x in ours["params"]]
        number = {"grad_scale": scaled, "found_inf": found_inf}
        one = {k: None if x is None else torch.tensor(x, device=device) for k, x in number.items()}
        lamb(**ours, **HOW, adapt=adapt, copies=copies, **one)
        if found_inf:
            names = "params", "exp_avgs", "exp_avg_sqs"
            before = given._asdict()
            return {name: Result(flat(ours[name]), flat(before[name]).double(), 0.0) for name in names}
        results = _compared(ours, given, _reference(given, scaled or 1.0, adapt))
        if copies is not None:
            kept = flat(ours["params"]).cpu().to(copy)
            results["copies"] = Result(flat(copies), kept.double(), 0.0)
        return results

    return compute


def _compared(
    ours: Mapping[str, list[Tensor]], given: Drawn, wanted: Mapping[str, Tensor]
) -> dict[str, Result]:
    """Sixteen roundings in fp32 of numbers that are no larger, then one to what is kept.

    An update is a quotient of moments as they are kept (one rounding, and half of one under the root), and its length
    and its tensor's have some 64 roundings more: sums of 4,096 positive terms by a tree, roots, quotients.
    """
    moments = ours["exp_avgs"][0].dtype
    sizes = {
        "params": flat(given.params).abs(),
        "exp_avgs": torch.maximum(flat(given.exp_avgs).abs().float(), flat(given.grads).abs().float()),
        "exp_avg_sqs": torch.maximum(
            flat(given.exp_avg_sqs).float(), 1e-3 * flat(given.grads).float().square()
        ),
    }
    results = {}
    for name, size in sizes.items():
        dtype = ours[name][0].dtype
        tolerance = max(float(size.max()), float(wanted[name].abs().max())) * (
            ROUNDING[dtype] + 16 * 2.0**-24
        )
        if name == "params":
            moved = float((wanted[name] - flat(given.params).double()).abs().max())
            tolerance += moved * (64 * 2.0**-24 + (4 * ROUNDING[moments] if moments != FP32 else 0))
        results[name] = Result(flat(ours[name]), wanted[name], tolerance)
    return results


def _reference(given: Drawn, scaled: float, adapt: bool) -> dict[str, Tensor]:
    """The one in PyTorch, in fp64."""
    params = [x.double().requires_grad_() for x in given.params]
    how = {k: HOW[k] for k in ("lr", "weight_decay", "eps")}
    optimizer = Lamb(params, betas=(HOW["beta1"], HOW["beta2"]), adapt=adapt, **how)
    for p, gradient, mean, square, step in zip(params, *given[1:], strict=True):
        p.grad = gradient.double() / scaled
        optimizer.state[p] = {
            "step": step - 1,
            "exp_avg": mean.double(),
            "exp_avg_sq": square.double(),
        }
    optimizer.step()
    states = [optimizer.state[p] for p in params]
    return {
        "params": flat(params).detach(),
        "exp_avgs": flat([s["exp_avg"] for s in states]),
        "exp_avg_sqs": flat([s["exp_avg_sq"] for s in states]),
    }


OFTEN = ("odd addresses", "zeros")
CASES: dict[str, Case] = {
    "fp32, gradients bf16, copies bf16": _case(FP32, BF16, FP32, copy=BF16),
    "fp32": _case(FP32, FP32, FP32),
    "fp32, moments bf16": _case(FP32, FP32, BF16),
    "bf16": _case(BF16, BF16, BF16),
    "fp32, gradients fp16 with a scale, copies fp16": _case(
        FP32, FP16, FP32, copy=FP16, scaled=1024.0, found_inf=0.0, size=100.0
    ),
    "not finite": _case(FP32, FP16, FP32, scaled=1024.0, found_inf=1.0),
    "without a ratio": _case(FP32, BF16, FP32, copy=BF16, adapt=False),
    "zeros": _case(FP32, FP32, FP32, zeros=True),
    "odd addresses": _case(FP32, BF16, FP32, copy=BF16, odd=True),
    "large gradients": _case(FP32, BF16, FP32, copy=BF16, size=1e4),
    "small gradients": _case(FP32, FP32, FP32, size=1e-6),
}


def _skipped(launch: Launch) -> Cost | None:
    found_inf = launch.arguments["found_inf"]
    if found_inf is not None and not found_inf.is_meta and found_inf:
        return Cost(4 * launch.programs, 0, 4)
    return None


def _scalars(launch: Launch) -> int:
    """Bytes of single numbers that a program reads beside its table's."""
    return sum(4 for name in ("grad_scale", "found_inf") if launch.arguments.get(name) is not None)


def _moments(launch: Launch) -> Cost:
    given, count = launch.arguments, elements(launch)
    weight, gradient, *states = (itemsize(given[name]) for name in ("PARAM", "GRAD", "MEAN", "SQUARE"))
    looked_up = 8 + 8 * 4 + 8 + 8 + _scalars(launch)
    read = count * (weight + gradient + sum(states)) + launch.programs * looked_up
    written = count * sum(states) + 8 * launch.programs
    least = once(launch) + count * (weight + gradient + 2 * sum(states))
    return _skipped(launch) or Cost(read, written, least, 0, 16 * count)


def _norms(launch: Launch) -> Cost:
    blocks = launch.arguments["partial"].shape[0]
    read = 8 * blocks + launch.programs * (16 + _scalars(launch))
    written = 8 * launch.programs
    return _skipped(launch) or Cost(read, written, read + written, 0, 2 * blocks)


def _step(launch: Launch) -> Cost:
    given, count = launch.arguments, elements(launch)
    weight, mean, square, copy = (itemsize(given[name]) for name in ("PARAM", "MEAN", "SQUARE", "COPY"))
    looked_up = 8 + 8 * (4 if copy else 3) + 8 + 8 + _scalars(launch)
    looked_up += 8 if given["squares"] is not None else 0
    read = count * (weight + mean + square) + launch.programs * looked_up
    least = once(launch) + count * (2 * weight + mean + square + copy)
    return _skipped(launch) or Cost(read, count * (weight + copy), least, 0, 10 * count)


COSTS = {"lamb_moments_kernel": _moments, "lamb_norms_kernel": _norms, "lamb_step_kernel": _step}

NARROW = {"lamb_norms_kernel": "a tensor's partial sums begin anywhere in their list, and are few"}
