"""Activations of feed-forward layers, plain and gated (Shazeer 2020, "GLU variants improve transformer")."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.fused import fused

_SQRT_8_OVER_PI = math.sqrt(8 / math.pi)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as in GPT-2."""
    if torch.compiler.is_compiling():
        # (1 + tanh u) / 2 = sigmoid 2u: the same function, and compiled exp is several times faster than tanh.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return (wide * torch.sigmoid(_SQRT_8_OVER_PI * (wide + 0.044715 * wide**3))).to(x.dtype)
    return F.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, Primer)."""
    return F.relu(x).square()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, as in Llama."""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, with the exact GELU."""
    return F.gelu(gate) * up


def geglu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) * up, as in T5 v1.1, which names it gated-gelu."""
    return gelu_tanh(gate) * up


PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}
GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "swiglu": swiglu,
    "geglu": geglu,
    "geglu_tanh": geglu_tanh,
}


def gated(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """GATED[activation](gate, up), in one pass over memory on GPUs. The plain ones are one pass as they are."""
    if fused(gate, up):
        from headway.kernels.triton import glu as fast

        return fast.glu(gate, up, activation)
    return GATED[activation](gate, up)
