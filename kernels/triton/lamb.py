"""LAMB of many tensors in three launches: moments and partial sums, norms, step.

PyTorch has no fused LAMB; the eleven operations on lists that make a step of it move 108 bytes an element in fp32. Here
it is 40 (38 with gradients of 16 bits, two more for a copy of 16): the first kernel reads gradient, weight and moments
(16) and writes the moments (8); the step reads weight and moments again (12) and writes the weight (4). It must, as no
element is moved before its tensor's norms are known; to keep the update would cost the same (4 written, 8 read), and
memory of its own.

LAMB, algorithm 2 of You et al. 2020 (arXiv:1904.00962) with debiased moments and phi the identity:

    m <- m + (1 - beta1) (g - m),  v <- v + (1 - beta2) (g^2 - v)
    r = m / (1 - beta1^t) / (sqrt(v) / sqrt(1 - beta2^t) + eps) + weight_decay w
    w <- w - lr |w| / |r| r

Sums are the same in every run: a block's squares are summed in fp32, the blocks' sums in fp64 in a fixed order. Other
ranks' shares are added between the two calls `lamb_squares` and `lamb_step`, which are `lamb` on one device.

Shapes: T tensors, P programs, N elements of a block, as in `tensor_table`.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.triton.tensor_table import (
    Table,
    block_of,
    corrections,
    dtype_of,
    pointer,
    put,
    table_of,
    taken,
)
from headway.kernels.triton.tuning import Config, Space


def _configs(target: str) -> list[Config]:
    return [Config({"N": 2048}, 4, 1), Config({"N": 4096}, 8, 1), Config({"N": 1024}, 4, 1)]


MOMENTS = Space("lamb_moments", _configs)
STEP = Space("lamb_step", _configs)
SUMS = 1024
"""Partial sums that are added at once."""


def lamb(
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
    adapt: bool = True,
    copies: Sequence[Tensor] | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """One step in place; arguments are those of `adamw`, and the decay is in the update, not beside it.

    Args:
        adapt: scale a tensor's update by the ratio of norms |w| / |r|, which is 1 where one of them is 0; else by 1.

    Raises:
        ValueError: tensors do not belong together, as `table_of` says.
    """
    how = {"beta1": beta1, "beta2": beta2, "weight_decay": weight_decay, "eps": eps, "found_inf": found_inf}
    states = exp_avgs, exp_avg_sqs, state_steps
    squares_T2 = lamb_squares(params, grads, *states, grad_scale=grad_scale, **how)
    lamb_step(params, *states, squares_T2 if adapt else None, lr=lr, copies=copies, **how)


@torch.compiler.disable  # Triton compiles the kernels itself
@torch.no_grad()
def lamb_squares(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    *,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> Tensor:
    """Takes gradients into the moments, in place; |w|^2 and |r|^2 of each tensor, fp32 [T, 2]."""
    if not params:
        return torch.zeros(0, 2)
    device = params[0].device
    config = MOMENTS.choose(device)
    lists = {"params": params, "grads": grads, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    table = table_of(lists, config.tiles["N"])
    squares_T2 = torch.zeros(len(params), 2, device=device)
    if not len(table.blocks):
        return squares_T2
    partial_P2 = torch.empty(len(table.blocks), 2, device=device)
    given = table.rows, table.blocks, corrections(state_steps, beta1, beta2, params), grad_scale, found_inf
    numbers = 1.0 - beta1, 1.0 - beta2, float(weight_decay), float(eps)
    types = {"GRAD": dtype_of(grads), **_types(params, exp_avgs, exp_avg_sqs, table)}
    with torch.cuda.device_of(params[0]):
        lamb_moments_kernel[len(table.blocks),](*given, partial_P2, *numbers, **types, **config.options)
        lamb_norms_kernel[len(params),](
            table.rows, found_inf, partial_P2, squares_T2, N=config.tiles["N"], SUMS=SUMS, num_warps=4
        )
    return squares_T2


@torch.compiler.disable  # Triton compiles the kernels itself
@torch.no_grad()
def lamb_step(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    state_steps: Sequence[Tensor],
    squares_T2: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    copies: Sequence[Tensor] | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Moves weights, in place, by the moments that `lamb_squares` has left and the squares of whole tensors.

    Without squares the ratio is 1.
    """
    if not params:
        return
    device = params[0].device
    config = STEP.choose(device)
    lists = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    table = table_of(lists | ({"copies": copies} if copies is not None else {}), config.tiles["N"])
    if not len(table.blocks):
        return
    given = table.rows, table.blocks, corrections(state_steps, beta1, beta2, params), squares_T2, found_inf
    copy = None if copies is None else dtype_of(copies)
    types = {"COPY": copy, **_types(params, exp_avgs, exp_avg_sqs, table)}
    with torch.cuda.device_of(params[0]):
        lamb_step_kernel[len(table.blocks),](
            *given, float(lr), float(weight_decay), float(eps), **types, **config.options
        )


def _types(params: Any, exp_avgs: Any, exp_avg_sqs: Any, table: Table) -> dict[str, Any]:
    lists = {"PARAM": params, "MEAN": exp_avgs, "SQUARE": exp_avg_sqs}
    return {name: dtype_of(tensors) for name, tensors in lists.items()} | {"ALIGN": table.aligned}


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def lamb_moments_kernel(
    rows,
    blocks,
    debias,
    grad_scale,
    found_inf,
    partial,
    rest1,
    rest2,
    decay,
    eps,
    PARAM: tl.constexpr,
    GRAD: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
    ALIGN: tl.constexpr,
    N: tl.constexpr,
):
    """A program: a block's moments, and its share of both norms. `rest1`, `rest2`: 1 - beta."""
    if found_inf is not None:  # noqa: SIM102 -- Triton does not cut an `and` short
        if tl.load(found_inf) != 0:
            return
    tensor, first, size = block_of(rows, blocks, 4, N)
    w = pointer(rows, tensor, 0, 4, PARAM, ALIGN)
    g = pointer(rows, tensor, 1, 4, GRAD, ALIGN)
    m = pointer(rows, tensor, 2, 4, MEAN, ALIGN)
    v = pointer(rows, tensor, 3, 4, SQUARE, ALIGN)
    debias1 = tl.load(debias + 2 * tensor)
    debias2 = tl.load(debias + 2 * tensor + 1)
    scale = 1.0
    if grad_scale is not None:
        scale = tl.load(grad_scale)
    place = first + tl.arange(0, N)
    out = partial + 2 * tl.program_id(0)
    if first + N <= size:
        _moments(w, g, m, v, out, place, size, scale, debias1, debias2, rest1, rest2, decay, eps, True)
    else:
        _moments(w, g, m, v, out, place, size, scale, debias1, debias2, rest1, rest2, decay, eps, False)


@triton.jit
def _moments(
    w, g, m, v, out, place, size, scale, debias1, debias2, rest1, rest2, decay, eps, FULL: tl.constexpr
):
    """Of a block's elements; its two sums of squares to `out`."""
    gradient = taken(g, place, size, FULL) / scale
    mean = taken(m, place, size, FULL)
    square = taken(v, place, size, FULL)
    weight = taken(w, place, size, FULL)
    mean += rest1 * (gradient - mean)
    square += rest2 * (gradient * gradient - square)
    mean = put(m, place, size, mean, FULL)  # norms are of what the step will read
    square = put(v, place, size, square, FULL)
    update = _update(weight, mean, square, debias1, debias2, decay, eps)
    if not FULL:  # 0 / eps is 0, but eps may be 0 as well
        update = tl.where(place < size, update, 0.0)
    tl.store(out, tl.sum(weight * weight, 0))
    tl.store(out + 1, tl.sum(update * update, 0))


@triton.jit
def _update(weight, mean, square, debias1, debias2, decay, eps):
    return mean / debias1 / (tl.sqrt(square) / debias2 + eps) + decay * weight


@triton.jit
def lamb_norms_kernel(rows, found_inf, partial, squares, N: tl.constexpr, SUMS: tl.constexpr):
    """A program: the sums of a tensor's blocks, in fp64: SUMS running ones, then all of them."""
    if found_inf is not None:  # noqa: SIM102 -- Triton does not cut an `and` short
        if tl.load(found_inf) != 0:
            return
    tensor = tl.program_id(0)
    count = tl.cdiv(tl.load(rows + tensor * 6 + 4), N)
    partial += 2 * tl.load(rows + tensor * 6 + 5)
    weights = tl.zeros([SUMS], tl.float64)
    updates = tl.zeros([SUMS], tl.float64)
    for first in range(0, count, SUMS):
        place = first + tl.arange(0, SUMS)
        weights += tl.load(partial + 2 * place, mask=place < count, other=0.0).to(tl.float64)
        updates += tl.load(partial + 2 * place + 1, mask=place < count, other=0.0).to(tl.float64)
    tl.store(squares + 2 * tensor, tl.sum(weights, 0).to(tl.float32))
    tl.store(squares + 2 * tensor + 1, tl.sum(updates, 0).to(tl.float32))


@triton.jit
def lamb_step_kernel(
    rows,
    blocks,
    debias,
    squares,
    found_inf,
    lr,
    decay,
    eps,
    PARAM: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARE: tl.constexpr,
    COPY: tl.constexpr,
    ALIGN: tl.constexpr,
    N: tl.constexpr,
):
    """A program: a block of a tensor. Without `squares`, the ratio is 1."""
    if found_inf is not None:  # noqa: SIM102 -- Triton does not cut an `and` short
        if tl.load(found_inf) != 0:
            return
    ROLES: tl.constexpr = 3 if COPY is None else 4
    tensor, first, size = block_of(rows, blocks, ROLES, N)
    w = pointer(rows, tensor, 0, ROLES, PARAM, ALIGN)
    m = pointer(rows, tensor, 1, ROLES, MEAN, ALIGN)
    v = pointer(rows, tensor, 2, ROLES, SQUARE, ALIGN)
    copy = w
    if COPY is not None:
        copy = pointer(rows, tensor, 3, ROLES, COPY, ALIGN)
    debias1 = tl.load(debias + 2 * tensor)
    debias2 = tl.load(debias + 2 * tensor + 1)
    if squares is not None:
        weights = tl.load(squares + 2 * tensor)
        updates = tl.load(squares + 2 * tensor + 1)
        ratio = tl.sqrt(weights) / tl.sqrt(tl.where(updates > 0, updates, 1.0))
        lr *= tl.where((weights > 0) & (updates > 0), ratio, 1.0)
    place = first + tl.arange(0, N)
    if first + N <= size:
        _step(w, m, v, copy, place, size, lr, debias1, debias2, decay, eps, COPY, True)
    else:
        _step(w, m, v, copy, place, size, lr, debias1, debias2, decay, eps, COPY, False)


@triton.jit
def _step(
    w, m, v, copy, place, size, lr, debias1, debias2, decay, eps, COPY: tl.constexpr, FULL: tl.constexpr
):
    """Of a block's elements; `lr` has the ratio."""
    weight = taken(w, place, size, FULL)
    mean = taken(m, place, size, FULL)
    square = taken(v, place, size, FULL)
    weight -= lr * _update(weight, mean, square, debias1, debias2, decay, eps)
    put(w, place, size, weight, FULL)
    if COPY is not None:
        put(copy, place, size, weight, FULL)
