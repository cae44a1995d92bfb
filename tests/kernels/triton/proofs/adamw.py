"""AdamW of many tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from headway.kernels.triton.adamw import adamw
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
    size: float = 1.0,
    odd: bool = False,
) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        given = drawn_lists(param, grad, moment, size)
        ours = given.on(device)
        if odd:
            ours = {name: [shifted(x) for x in tensors] for name, tensors in ours.items()}
        before = given.on(torch.device("cpu"))
        copies = None if copy is None else [torch.empty_like(x, dtype=copy) for x in ours["params"]]
        number = {"grad_scale": scaled, "found_inf": found_inf}
        one = {k: None if x is None else torch.tensor(x, device=device) for k, x in number.items()}
        adamw(**ours, **HOW, copies=copies, **one)
        if found_inf:
            names = "params", "exp_avgs", "exp_avg_sqs"
            return {name: Result(flat(ours[name]), flat(before[name]).double(), 0.0) for name in names}
        wanted = _reference(Drawn(**before), scaled or 1.0)
        # Some sixteen roundings in fp32 of numbers that are no larger, then one to what is kept; roots may be off by
        # two units, quotients too. The step is lr x at most |m| / |v| times debiasing, whose roundings are its own.
        results = {}
        for name, dtype in (("params", param), ("exp_avgs", moment), ("exp_avg_sqs", moment)):
            largest = float(torch.maximum(flat(before[name]).abs().double(), wanted[name].abs()).max())
            if name == "exp_avg_sqs":
                largest = max(largest, float(flat(before["grads"]).double().square().max()) * 1e-3)
            tolerance = largest * (ROUNDING[dtype] + 16 * 2.0**-24) + _step_error(name, wanted, before)
            results[name] = Result(flat(ours[name]), wanted[name], tolerance)
        if copies is not None:
            kept = flat(ours["params"]).cpu().to(copy)
            results["copies"] = Result(flat(copies), kept.double(), 0.0)
        return results

    return compute


def _step_error(
    name: str, wanted: Mapping[str, torch.Tensor], before: Mapping[str, list[torch.Tensor]]
) -> float:
    """Of what weights are moved by."""
    if name != "params":
        return 0.0
    moved = (wanted["params"] - flat(before["params"]).double()).abs().max()
    return float(moved) * 32 * 2.0**-24


def _reference(given: Drawn, scaled: float) -> dict[str, torch.Tensor]:
    """PyTorch's, tensor by tensor, in fp64."""
    params = [x.double().requires_grad_() for x in given.params]
    how = {k: HOW[k] for k in ("lr", "weight_decay", "eps")}
    optimizer = torch.optim.AdamW(params, betas=(HOW["beta1"], HOW["beta2"]), foreach=False, **how)
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


OFTEN = ("odd addresses", "not finite")
CASES: dict[str, Case] = {
    "fp32, gradients bf16, copies bf16": _case(FP32, BF16, FP32, copy=BF16),
    "fp32": _case(FP32, FP32, FP32),
    "fp32, moments bf16": _case(FP32, FP32, BF16),
    "bf16": _case(BF16, BF16, BF16),
    "fp32, gradients fp16 with a scale, copies fp16": _case(
        FP32, FP16, FP32, copy=FP16, scaled=1024.0, found_inf=0.0, size=100.0
    ),
    "not finite": _case(FP32, FP16, FP32, scaled=1024.0, found_inf=1.0),
    "odd addresses": _case(FP32, BF16, FP32, copy=BF16, odd=True),
    "large gradients": _case(FP32, BF16, FP32, copy=BF16, size=1e4),
    "small gradients": _case(FP32, FP32, FP32, size=1e-6),
}


def _cost(launch: Launch) -> Cost:
    given = launch.arguments
    if given["found_inf"] is not None and not given["found_inf"].is_meta and given["found_inf"]:
        return Cost(4 * launch.programs, 0, 4)
    states = sum(itemsize(given[name]) for name in ("PARAM", "MEAN", "SQUARE"))
    gradient, copy = (itemsize(given[name]) for name in ("GRAD", "COPY"))
    count = elements(launch)
    looked_up = 8 + 8 * (5 if copy else 4) + 8 + 8
    looked_up += sum(4 for name in ("grad_scale", "found_inf") if given[name] is not None)
    read = count * (states + gradient) + launch.programs * looked_up
    written = count * (states + copy)
    return Cost(read, written, once(launch) + count * (2 * states + gradient + copy), 0, 16 * count)


COSTS = {"adamw_step_kernel": _cost}
