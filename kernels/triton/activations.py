"""Activations in kernels: those of `kernels.glu` by the names that it has for them."""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import math

import triton
import triton.language as tl

GATES = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""What a gate is given to, of every gated activation."""

_SQRT_HALF = tl.constexpr(math.sqrt(0.5))
_NORMAL = tl.constexpr(1 / math.sqrt(2 * math.pi))
_SQRT_8_OVER_PI = tl.constexpr(math.sqrt(8 / math.pi))


@triton.jit
def activated(x, NAME: tl.constexpr):
    """f(x) and f'(x) of fp32; who needs one of them pays for one, as what is not used is not compiled."""
    if NAME == "silu":
        s = tl.sigmoid(x)
        return x * s, s + x * s * (1 - s)
    elif NAME == "gelu":
        below = 0.5 + 0.5 * tl.erf(x * _SQRT_HALF)
        return x * below, below + x * _NORMAL * tl.exp(-0.5 * x * x)
    elif NAME == "gelu_tanh":
        # (1 + tanh u) / 2 = sigmoid 2u
        s = tl.sigmoid((x + 0.044715 * x * x * x) * _SQRT_8_OVER_PI)
        return x * s, s + x * s * (1 - s) * _SQRT_8_OVER_PI * (1 + 0.134145 * x * x)
    else:
        tl.static_assert(NAME == "relu" or NAME == "relu2")
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if NAME == "relu":
            return positive, tl.where(x > 0, 1.0, 0.0)
        return positive * positive, 2 * positive
