"""Rows x width; gated activations and plain ones with a bias."""

from __future__ import annotations

import torch

from headway.kernels.glu import GATED
from headway.kernels.triton.glu import activate, glu
from headway.kernels.triton.workloads import normal


def _call(device: torch.device, rows: int, width: int, *names: str) -> None:
    gate, up, bias = normal(device, rows, width), normal(device, rows, width), normal(device, width)
    for name in names:
        if name not in GATED:
            y, given = activate(gate, name, bias), [gate, bias]
        elif name == "geglu":
            y, given = glu(gate, up, name, bias, bias), [gate, up, bias]
        else:
            y, given = glu(gate, up, name), [gate, up]
        torch.autograd.grad(y, given, y)


SIZES = {
    "8,192 x 3,072": lambda device: _call(device, 8192, 3072, "gelu", "gelu_tanh", "relu2", "geglu"),
    "16,384 x 11,008": lambda device: _call(device, 16384, 11008, "swiglu", "silu"),
    "16,384 x 28,672": lambda device: _call(device, 16384, 28672, "swiglu", "geglu_tanh"),
}
