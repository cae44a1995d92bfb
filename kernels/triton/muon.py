"""Newton-Schulz iterations of Muon, batched: what `pretrain.optim.muon.orthogonalise` computes.

An iteration X <- a X + (b A + c A^2) X with A = X X^T is three products. Beside `torch.bmm` and `torch.baddbmm` is
saved:

- half of the first two, whose results are symmetric: only tiles on and below the diagonal are computed, and written
  twice. Of square matrices that is 4 m^3 FLOPs an iteration instead of 6 m^3, of wide ones (n = 4 m) 13 of 18.
- a pass over what is added in the last two, as `baddbmm` first copies it into its result.

So it is for a bf16 model's matrices from some hundreds wide; in fp32, which NVIDIA's tensor cores do not take, and for
small matrices, PyTorch is as good. Products are of X's own dtype, sums in fp32; A, b A + c A^2 and X are rounded to X's
dtype once each. Programs share nothing, so operands are read more often than once: a row of tiles of X for each tile of
A in that row or column; P for each column of tiles of X, and X for each row of tiles of P. Programs that run together
belong to one row of A, or to one column of X, and find what they share in the second-level cache.

Shapes: B matrices [M, N] with M <= N; in kernels tiles of R rows and C columns, K of a sum at a time.
"""

# Triton gives the arguments of kernels their types; only constants are marked.
# mypy: allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from headway.kernels.triton.numbers import narrowed, operand
from headway.kernels.triton.tuning import Config, Space

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""That products are computed of."""


def _symmetric_configs(target: str, itemsize: int, side: int) -> list[Config]:
    """`side`: of a tile, 64 or 128. On gfx942 tiles of both operands and a result fit into 64 KiB."""
    depth = 32 if itemsize == 4 or target == "gfx942" else 64
    stages = {"sm_80": 3, "sm_90a": 4, "sm_100a": 4, "gfx942": 2}[target]
    warps = 8 if side == 128 else 4
    return [
        Config({"R": side, "K": depth}, warps, min(stages, 3) if itemsize == 4 else stages),
        Config({"R": 64, "K": depth}, 4, 2),
    ]


def _move_configs(target: str, itemsize: int, side: int) -> list[Config]:
    square, small = _symmetric_configs(target, itemsize, side)
    depth = square.tiles["K"]
    found = [
        square._replace(tiles={"R": side, "C": 128, "K": depth}),
        small._replace(tiles={"R": 64, "C": 64, "K": depth}),
    ]
    if target == "sm_90a" and itemsize == 2 and side == 128:
        found.append(Config({"R": 128, "C": 256, "K": depth}, 8, 3))
    return found


SYMMETRIC = Space("muon_symmetric", _symmetric_configs)
MOVE = Space("muon_move", _move_configs)


@torch.compiler.disable  # Triton compiles the kernels itself
@torch.no_grad()
def orthogonalise(
    x_BMN: Tensor, coefficients: tuple[float, float, float], steps: int = 5, eps: float = 1e-7
) -> Tensor:
    """Nearly the closest semi-orthogonal matrices: U V^T for x = U S V^T, with singular values near 1; [B, M, N].

    Args:
        x_BMN: matrices with M <= N, in fp32, bf16 or fp16; that is the dtype of products, and of what is returned.
        coefficients: a, b, c of the quintic.
        steps: iterations, after scaling to Frobenius norm 1.
        eps: least norm, so that zero stays zero.

    Raises:
        ValueError: x is not like that.
    """
    if x_BMN.ndim != 3 or x_BMN.shape[1] > x_BMN.shape[2]:
        raise ValueError(
            f"x: shape {tuple(x_BMN.shape)}; it must be [B, M, N] with M <= N: transpose tall matrices"
        )
    if x_BMN.dtype not in DTYPES:
        raise ValueError(f"x: {x_BMN.dtype}; products are of {', '.join(map(str, DTYPES))}")
    a, b, c = coefficients
    norm_B11 = torch.linalg.vector_norm(x_BMN, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x_BMN = (x_BMN / norm_B11.clamp(min=eps).to(x_BMN.dtype)).contiguous()
    if not x_BMN.numel():
        return x_BMN
    spare_BMN = torch.empty_like(x_BMN) if steps else x_BMN
    gram_BMM, poly_BMM = x_BMN.new_empty(2, *x_BMN.shape[:2], x_BMN.shape[1])
    for _ in range(steps):
        symmetric(x_BMN, gram_BMM)
        symmetric(gram_BMM, poly_BMM, alpha=c, added=gram_BMM, beta=b)
        move(poly_BMM, x_BMN, spare_BMN, a)
        x_BMN, spare_BMN = spare_BMN, x_BMN
    return x_BMN


def symmetric(
    x_BMN: Tensor, out_BMM: Tensor, *, alpha: float = 1.0, added: Tensor | None = None, beta: float = 0.0
) -> None:
    """out = alpha X X^T + beta added, all contiguous and of one dtype; `added`, like `out`, is symmetric."""
    batch, rows, columns = x_BMN.shape
    config = SYMMETRIC.choose(x_BMN.device, itemsize=x_BMN.element_size(), side=_side(rows))
    blocks = triton.cdiv(rows, config.tiles["R"])
    grid = (batch * (blocks * (blocks + 1) // 2),)
    with torch.cuda.device_of(x_BMN):
        muon_symmetric_kernel[grid](
            x_BMN, added, out_BMM, rows, columns, float(alpha), float(beta), **config.options
        )


def move(p_BMM: Tensor, x_BMN: Tensor, out_BMN: Tensor, a: float) -> None:
    """out = a X + P X, all contiguous and of one dtype."""
    batch, rows, columns = x_BMN.shape
    config = MOVE.choose(x_BMN.device, itemsize=x_BMN.element_size(), side=_side(rows))
    grid = (batch * triton.cdiv(rows, config.tiles["R"]) * triton.cdiv(columns, config.tiles["C"]),)
    with torch.cuda.device_of(x_BMN):
        muon_move_kernel[grid](p_BMM, x_BMN, out_BMN, rows, columns, float(a), **config.options)


def _side(rows: int) -> int:
    return 64 if rows <= 64 else 128


# -- kernels -------------------------------------------------------------------------------------------------------


@triton.jit
def muon_symmetric_kernel(x, added, out, rows, columns, alpha, beta, R: tl.constexpr, K: tl.constexpr):
    """A program: a tile on or below the diagonal of one matrix, and its mirror image.

    Tiles are numbered row by row: number t is in row i where i (i + 1) / 2 <= t. Its root in fp32 may be one off.
    """
    blocks = tl.cdiv(rows, R)
    tiles = blocks * (blocks + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    i = ((tl.sqrt(8.0 * t.to(tl.float32) + 1.0) - 1.0) / 2).to(tl.int32)
    i -= (i * (i + 1) // 2 > t).to(tl.int32)
    i += ((i + 1) * (i + 2) // 2 <= t).to(tl.int32)
    j = t - i * (i + 1) // 2
    x += batch * rows * columns
    row = i * R + tl.arange(0, R)
    column = j * R + tl.arange(0, R)
    depth = tl.arange(0, K)
    left = x + row.to(tl.int64)[:, None] * columns + depth[None, :]
    right = x + column.to(tl.int64)[:, None] * columns + depth[None, :]
    sums = tl.zeros([R, R], tl.float32)
    for first in range(0, columns, K):
        there = (first + depth < columns)[None, :]
        a = operand(tl.load(left + first, mask=there & (row < rows)[:, None], other=0.0))
        b = operand(tl.load(right + first, mask=there & (column < rows)[:, None], other=0.0))
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    sums *= alpha
    inside = (row < rows)[:, None] & (column < rows)[None, :]
    base = batch * rows * rows
    place = base + row.to(tl.int64)[:, None] * rows + column[None, :]
    if added is not None:
        sums += beta * tl.load(added + place, mask=inside, other=0.0).to(tl.float32)
    result = narrowed(sums, out.dtype.element_ty)
    tl.store(out + place, result, mask=inside)
    if i != j:
        mirrored = base + column.to(tl.int64)[:, None] * rows + row[None, :]
        there = (column < rows)[:, None] & (row < rows)[None, :]
        tl.store(out + mirrored, tl.trans(result), mask=there)


@triton.jit
def muon_move_kernel(p, x, out, rows, columns, a, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr):
    """A program: a tile of a X + P X of one matrix; neighbours have the same columns of X."""
    high = tl.cdiv(rows, R)
    tiles = high * tl.cdiv(columns, C)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    p += batch * rows * rows
    x += batch * rows * columns
    row = t % high * R + tl.arange(0, R)
    column = t // high * C + tl.arange(0, C)
    depth = tl.arange(0, K)
    left = p + row.to(tl.int64)[:, None] * rows + depth[None, :]
    right = x + depth.to(tl.int64)[:, None] * columns + column[None, :]
    sums = tl.zeros([R, C], tl.float32)
    for first in range(0, rows, K):
        there = first + depth < rows
        u = operand(tl.load(left + first, mask=there[None, :] & (row < rows)[:, None], other=0.0))
        v = operand(tl.load(right, mask=there[:, None] & (column < columns)[None, :], other=0.0))
        sums = tl.dot(u, v, sums, input_precision="ieee")
        right += K * columns
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    place = batch * rows * columns + row.to(tl.int64)[:, None] * columns + column[None, :]
    sums += a * tl.load(x + place - batch * rows * columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + place, narrowed(sums, out.dtype.element_ty), mask=inside)
