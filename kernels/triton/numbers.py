"""Numbers of 16 bits in kernels, on a GPU and in Triton's interpreter.

The interpreter (3.9) keeps bf16 as integers, computes with them as such, silently, and cuts off what a conversion
drops. So there what is loaded is widened at once, and what is stored is rounded, half to even, before it is converted;
on a GPU both are nothing, and products take the operands as they are.
"""

# Triton gives the arguments their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def operand(x):
    """What was loaded, as an operand of a product: of its own dtype, so that tensor cores take it."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return x.to(tl.float32)
    return x


@triton.jit
def narrowed(x, like):
    """fp32 as the dtype of what `like` points to, or of an operand: rounded half to even."""
    if INTERPRETED and like == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        finite = x == x  # a payload may become an infinity's
        x = tl.where(finite, rounded.to(tl.float32, bitcast=True), x)
    return x.to(like)


@triton.jit
def as_operand(x, like):
    """A computed fp32 tile as an operand beside one of dtype `like`: rounded to it, so that tensor cores take both."""
    return operand(narrowed(x, like))
