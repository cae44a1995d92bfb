"""Newton-Schulz iterations, and each of their products alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels.triton.muon import move, orthogonalise, symmetric
from headway.pretrain.optim import muon as reference
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, once, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
A, B, C = reference.COEFFICIENTS


def _drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    draw = torch.Generator().manual_seed(seed())
    return (torch.randn(*shape, generator=draw) * scale).to(dtype)


def _symmetric(batch: int, rows: int, columns: int, dtype: torch.dtype, added: bool) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        x = _drawn(batch, rows, columns, dtype=dtype)
        bias = _drawn(batch, rows, rows, dtype=dtype)
        bias = bias.tril() + bias.tril(-1).mT
        out = torch.empty(batch, rows, rows, dtype=dtype, device=device)
        more = {"alpha": C, "added": bias.to(device), "beta": B} if added else {}
        symmetric(x.to(device), out, **more)
        wide, alpha = x.double(), C if added else 1.0
        wanted = alpha * wide @ wide.mT + (B * bias.double() if added else 0)
        terms = alpha * wide.abs() @ wide.abs().mT + (abs(B) * bias.double().abs() if added else 0)
        found = out.cpu()
        mirror = Result(found, found.mT.double(), 0.0)
        return {"out": Result(found, wanted, _tolerance(wanted, terms, columns, dtype)), "mirror": mirror}

    return compute


def _move(batch: int, rows: int, columns: int, dtype: torch.dtype) -> Case:
    def compute(device: torch.device) -> Mapping[str, Result]:
        p, x = _drawn(batch, rows, rows, dtype=dtype), _drawn(batch, rows, columns, dtype=dtype)
        out = torch.empty_like(x, device=device)
        move(p.to(device), x.to(device), out, A)
        wanted = A * x.double() + p.double() @ x.double()
        terms = A * x.double().abs() + p.double().abs() @ x.double().abs()
        return {"out": Result(out, wanted, _tolerance(wanted, terms, rows, dtype))}

    return compute


def _tolerance(wanted: Tensor, terms: Tensor, length: int, dtype: torch.dtype) -> float:
    """Rounded once to the dtype, after a sum in fp32: a rounding for each term, twice where tensor cores cut off."""
    return float(wanted.abs().max()) * ROUNDING[dtype] + float(terms.max()) * (length + 4) * 2.0**-23


def _whole(batch: int, rows: int, columns: int, dtype: torch.dtype = FP32, scale: float = 1.0) -> Case:
    """Five iterations are as far from those in fp64 (Frobenius) as the reference in their dtype is, up to a half more.

    A bound on errors is of no use here: the quintic's slope is at most 4 where singular values are, so that they may
    grow by 4^5, and hardly grow. Beside that, where the reference is right by luck, one iteration's roundings in fp32
    of numbers of norm sqrt(M): 1.2 for X, 1.2 x 2.8 for b A + c A^2, 1.2 x 4.8 x 1.4 for A, in all 13.
    """

    def compute(device: torch.device) -> Mapping[str, Result]:
        x = _drawn(batch, rows, columns, dtype=dtype, scale=scale)
        exact = reference.orthogonalise(x.double())
        found = orthogonalise(x.to(device), reference.COEFFICIENTS).cpu()
        far = float((reference.orthogonalise(x).double() - exact).norm())
        tolerance = 1.5 * far + 13 * (batch * rows) ** 0.5 * 2.0**-24
        return {"apart": Result((found.double() - exact).norm(), torch.zeros(()).double(), tolerance)}

    return compute


def _zeros(device: torch.device) -> Mapping[str, Result]:
    x = torch.zeros(2, 7, 40, device=device)
    found = orthogonalise(x, reference.COEFFICIENTS)
    return {"out": Result(found, torch.zeros(2, 7, 40).double(), 0.0)}


OFTEN = ("5 steps, 2 x 64 x 80, fp16",)
CASES: dict[str, Case] = {
    "5 steps, 3 x 40 x 200, fp32": _whole(3, 40, 200),
    "5 steps, 1 x 150 x 150, fp32": _whole(1, 150, 150),
    "5 steps, 2 x 1 x 7, fp32": _whole(2, 1, 7),
    "5 steps, 2 x 130 x 256, bf16": _whole(2, 130, 256, BF16),
    "5 steps, 2 x 64 x 80, fp16": _whole(2, 64, 80, FP16),
    "5 steps, large": _whole(1, 20, 33, scale=1e4),
    "5 steps, small": _whole(1, 20, 33, scale=1e-4),
    "zeros": _zeros,
    **{
        f"symmetric, {b} x {m} x {n}, {dtype}{', added' if added else ''}": _symmetric(b, m, n, dtype, added)
        for b, m, n, dtype, added in (
            (1, 300, 77, BF16, True),
            (2, 64, 128, BF16, False),
            (3, 33, 65, FP32, True),
            (1, 129, 129, FP16, True),
        )
    },
    **{
        f"move, {b} x {m} x {n}, {dtype}": _move(b, m, n, dtype)
        for b, m, n, dtype in (
            (1, 140, 300, BF16),
            (2, 64, 128, BF16),
            (3, 33, 65, FP32),
            (1, 129, 130, FP16),
        )
    },
}


def _cost_of_symmetric(launch: Launch) -> Cost:
    """A row of X is read once with every tile row at or below its own, and once with every one at or above."""
    given = launch.arguments
    batch, rows, columns = given["x"].shape
    item, side, depth = given["x"].element_size(), given["R"], given["K"]
    blocks = -(-rows // side)
    diagonal = (blocks - 1) * side**2 + (rows - (blocks - 1) * side) ** 2
    lower = (rows**2 + diagonal) // 2
    read = rows * (blocks + 1) * columns + (lower if given["added"] is not None else 0)
    products = launch.programs * 2 * side**2 * depth * -(-columns // depth)
    twice = given["x"].numel() * item if given["added"] is given["x"] else 0
    return Cost(
        batch * read * item, batch * rows**2 * item, once(launch) - twice, products, 2 * batch * lower
    )


def _cost_of_move(launch: Launch) -> Cost:
    given = launch.arguments
    batch, rows, columns = given["x"].shape
    high, wide, depth = given["R"], given["C"], given["K"]
    read = rows**2 * -(-columns // wide) + rows * columns * (-(-rows // high) + 1)
    products = launch.programs * 2 * high * wide * depth * -(-rows // depth)
    item, size = given["x"].element_size(), batch * rows * columns
    return Cost(batch * read * item, size * item, once(launch), products, 2 * size)


COSTS = {"muon_symmetric_kernel": _cost_of_symmetric, "muon_move_kernel": _cost_of_move}
