"""AdamW of many tensors in one launch, from gradients of 16 bits, with the 16-bit copy written in the same pass.

Where parameters and gradients have one dtype and no copy is kept, PyTorch's fused AdamW is as good: one pass, 28 bytes
an element in fp32. It takes no gradients of another dtype than the parameters', so that fp32 masters of a bf16 model
cost two passes more: the gradient is widened first (6 bytes), the master narrowed afterwards (6), in all 40 bytes an
element. Here it is 28, 2 + 12 read and 12 + 2 written; that is what this is for.

AdamW of Loshchilov & Hutter 2019 (arXiv:1711.05101), as `torch.optim.AdamW` has it:

    m <- m + (1 - beta1) (g - m),  v <- v + (1 - beta2) (g^2 - v)
    w <- w (1 - lr decay) - lr / (1 - beta1^t) m / (sqrt(v) / sqrt(1 - beta2^t) + eps)

Shapes: T tensors, P programs, N elements of a block, as in `tensor_table`.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.triton.tensor_table import block_of, corrections, dtype_of, pointer, put, table_of, taken
from headway.kernels.triton.tuning import Config, Space


def _configs(target: str) -> list[Config]:
    return [Config({"N": 2048}, 4, 1), Config({"N": 4096}, 8, 1), Config({"N": 1024}, 4, 1)]


STEP = Space("adamw_step", _configs)


@torch.compiler.disable  # Triton compiles the kernels itself
@torch.no_grad()
def adamw(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    copies: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step in place, with the arguments of `torch._fused_adamw_`; gradients stay as they are.

    Args:
        params, grads, exp_avgs, exp_avg_sqs: T contiguous tensors each, of one dtype in a list: fp32, bf16 or fp16.
        state_steps: T tensors of one number: which step this is of each, from 1. On any one device.
        lr: learning rate.
        beta1, beta2: decay of the moments.
        weight_decay: decoupled.
        eps: beside the root of the second moment.
        copies: T tensors that are given the new parameters, in their own dtype.
        grad_scale: one number, fp32, by which gradients are divided: a loss scale, or clipping.
        found_inf: one number, fp32; where it is not 0, nothing is changed, copies neither.

    Raises:
        ValueError: tensors do not belong together, as `table_of` says.
    """
    if not params:
        return
    device = params[0].device
    config = STEP.choose(device)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    table = table_of(lists | ({"copies": copies} if copies is not None else {}), config.tiles["N"])
    if not len(table.blocks):
        return
    debias_T2 = corrections(state_steps, beta1, beta2, params)
    numbers = float(lr), 1.0 - beta1, 1.0 - beta2, float(lr * weight_decay), float(eps)
    with torch.cuda.device_of(params[0]):
        adamw_step_kernel[len(table.blocks),](
            table.rows,
            table.blocks,
            debias_T2,
            grad_scale,
            found_inf,
            *numbers,
            PARAM=dtype_of(params),
            GRAD=dtype_of(grads),
            MEAN=dtype_of(exp_avgs),
            SQUARE=dtype_of(exp_avg_sqs),
            COPY=None if copies is None else dtype_of(copies),
            ALIGN=table.aligned,
            **config.options,
        )


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def adamw_step_kernel(
    rows,
    blocks,
    debias,
    grad_scale,
    found_inf,
    lr,
    rest1,
    rest2,
    decay,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,
    N: tl.constexpr,
):
    """A program: a block of a tensor. `rest1`, `rest2`: 1 - beta; `decay`: lr x weight decay."""
    if found_inf is not None:  # noqa: SIM102 -- Triton does not cut an `and` short
        if tl.load(found_inf) != 0:
            return
    ROLES: tl.constexpr = 4 if COPY is None else 5
    tensor, first, size = block_of(rows, blocks, ROLES, N)
    w = pointer(rows, tensor, 0, ROLES, PARAM, ALIGN)
    g = pointer(rows, tensor, 1, ROLES, GRAD, ALIGN)
    m = pointer(rows, tensor, 2, ROLES, MEAN, ALIGN)
    v = pointer(rows, tensor, 3, ROLES, SQUARE, ALIGN)
    copy = w
    if COPY is not None:
        copy = pointer(rows, tensor, 4, ROLES, COPY, ALIGN)
    step = lr / tl.load(debias + 2 * tensor)
    root = tl.load(debias + 2 * tensor + 1)
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    place = first + tl.arange(0, N)
    if first + N <= size:
        _step(w, g, m, v, copy, place, size, scale, step, root, rest1, rest2, decay, eps, COPY, True)
    else:
        _step(w, g, m, v, copy, place, size, scale, step, root, rest1, rest2, decay, eps, COPY, False)


@triton.jit
def _step(
    w,
    g,
    m,
    v,
    copy,
    place,
    size,
    scale,
    step,
    root,
    rest1,
    rest2,
    decay,
    eps,
    COPY: tl.constexpr,
    FULL: tl.constexpr,
):
    """Of a block's elements."""
    gradient = taken(g, place, size, FULL) / scale
    mean = taken(m, place, size, FULL)
    square = taken(v, place, size, FULL)
    weight = taken(w, place, size, FULL)
    mean += rest1 * (gradient - mean)
    square += rest2 * (gradient * gradient - square)
    weight -= decay * weight
    weight -= step * (mean / (tl.sqrt(square) / root + eps))
    put(m, place, size, mean, FULL)
    put(v, place, size, square, FULL)
    put(w, place, size, weight, FULL)
    if COPY is not None:
        put(copy, place, size, weight, FULL)
