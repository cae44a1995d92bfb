"""Tensors of a model of 124 million parameters, one large tensor, many small ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from headway.kernels.triton.adamw import adamw

HOW: dict[str, Any] = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}
MODEL = (*[786_432] * 98, 38_633_472, *[147_456] * 49)
"""Elements of tensors, multiples of every block."""


def lists(device: torch.device, sizes: Sequence[int]) -> dict[str, Any]:
    """Master weights, bf16 gradients, moments, bf16 copies of the weights, and which step it is."""
    names = {"params": 4, "grads": 2, "exp_avgs": 4, "exp_avg_sqs": 4, "copies": 2}
    kinds = {4: torch.float32, 2: torch.bfloat16}
    found = {
        name: [torch.rand(n, dtype=kinds[item], device=device) for n in sizes] for name, item in names.items()
    }
    return found | {"state_steps": [torch.full((), 10.0, device=device) for _ in sizes]}


def scales(device: torch.device) -> dict[str, Any]:
    """A scale of gradients, and that none of them was infinite."""
    return {"grad_scale": torch.ones((), device=device), "found_inf": torch.zeros((), device=device)}


def _call(device: torch.device, *sizes: int, scaled: bool = False) -> None:
    adamw(**lists(device, sizes), **HOW, **(scales(device) if scaled else {}))


SIZES = {
    "148 tensors, 124 million": lambda device: _call(device, *MODEL),
    "one of 1 billion": lambda device: _call(device, 1 << 30),
    "1,000 of 4,096, with a scale": lambda device: _call(device, *[4096] * 1000, scaled=True),
}
