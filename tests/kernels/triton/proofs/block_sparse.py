"""Softmax attention over the blocks of a scope.

Shapes: B batch, H query heads, K key heads, S places, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention import dense, scopes
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.triton.block_sparse import attention
from headway.kernels.triton.workloads import block_sparse as workload
from headway.tests.kernels.triton.attention_roundings import (
    ROUNDING,
    Off,
    bound,
    products_off,
    sums_over_keys,
    sums_over_queries,
)
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed
from headway.tests.kernels.triton.sparse_costs import columns


def _case(
    scope: scopes.Scope,
    causal: bool = True,
    dtype: torch.dtype = torch.float32,
    width: int = 40,
    length: int = 100,
    heads: tuple[int, int] = (1, 1),
    batch: int = 1,
    documents: list[list[int]] | None = None,
    p: float = 0.0,
    size: float = 1.0,
) -> Case:
    """Operands are [B, S, H, D] in memory, as projections give. `documents`: their lengths, padding after them; `size`:
    of queries and keys."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        shapes = [(batch, length, n, width) for n in (heads[0], heads[1], heads[1], heads[0])]
        q, k, v, slope = (drawn(draw, *shape).detach().transpose(1, 2) for shape in shapes)
        q, k, v, slope = (x.to(dtype) for x in (q * size, k * size, v, slope))
        mask = Mask(causal, None if documents is None else _numbered(documents, length), scope=scope)
        drop = _dropout(batch, length, p) if p else None
        given = [x.to(device).requires_grad_() for x in (q, k, v)]
        there = mask if documents is None else mask._replace(documents=mask.documents.to(device))
        out = attention(*given, there, None if drop is None else _moved(drop, device))
        found = (out, *torch.autograd.grad(out, given, slope.to(device)))
        wide = [x.double().requires_grad_() for x in (q, k, v)]
        out_64 = dense.reference(*wide, mask, drop)
        wanted = (out_64.detach(), *torch.autograd.grad(out_64, wide, slope.double()))
        tolerances = _tolerances([x.detach() for x in wide], slope.double(), mask, drop, wanted, dtype)
        names = ("out", "d_q", "d_k", "d_v")
        rows = zip(names, found, wanted, tolerances, strict=True)
        return {name: Result(f, w, t) for name, f, w, t in rows}

    return compute


def _numbered(lengths: list[list[int]], total: int) -> Tensor:
    rows = [[i for i, length in enumerate(row) for _ in range(length)] for row in lengths]
    return torch.tensor([row + [-1] * (total - len(row)) for row in rows])


def _dropout(batch: int, length: int, p: float) -> WeightDropout:
    return WeightDropout(
        p, torch.tensor(random.key(3, "weights")), torch.arange(batch) + 5, torch.arange(length) + 7, 2
    )


def _moved(drop: WeightDropout, device: torch.device) -> WeightDropout:
    moved = {name: getattr(drop, name).to(device) for name in ("key", "slots", "positions")}
    return drop._replace(**moved)


def _tolerances(
    operands: list[Tensor],
    slope: Tensor,
    mask: Mask,
    drop: WeightDropout | None,
    wanted: tuple,
    dtype: torch.dtype,
) -> tuple[float, float, float, float]:
    """By `attention_roundings`. Scores are off, so weights relatively by as much, of the output's that of the row's sum
    less, and of gradients', whose scores are computed anew, that of the forward's sum more; weights, outputs that delta
    is made of, and gradients of scores are rounded to the dtype."""
    q, k, v = operands
    scale, unit = q.shape[-1] ** -0.5, ROUNDING[dtype] / 3**0.5
    weights = dense.attention_weights(q, k, mask)
    grows = torch.ones_like(weights)
    if drop is not None:
        grows = drop.kept(q.shape[1], slice(None), slice(0, k.shape[2])) * random.kept_scale(drop.p)
    used, out = weights * grows, wanted[0]
    scores_off = products_off(q, k, scale)
    in_row = (weights * scores_off**2).sum(-1, keepdim=True).sqrt()  # of a row's sum, relative
    relative = (scores_off**2 + unit**2).sqrt()
    d_weights = grows * (slope @ dense.per_query_head(v, q).mT)
    d_scores = weights * (d_weights - (slope * out).sum(-1, keepdim=True))
    delta_off = (unit * slope * out).square().sum(-1, keepdim=True)
    delta_off = (delta_off + (weights * relative * d_weights).square().sum(-1, keepdim=True)).sqrt()
    weights_off = Off(used * relative, in_row, used)
    product_off = weights * grows * products_off(slope, v)
    each = ((d_scores * relative) ** 2 + product_off**2 + (in_row * d_scores) ** 2).sqrt()
    d_scores_off = Off(scale * each, scale * delta_off, weights)
    return (
        bound(_output_off(weights, grows, scores_off, unit, dense.per_query_head(v, q), out), out, dtype),
        sums_over_keys(d_scores_off, k, wanted[1], dtype),
        sums_over_queries(d_scores_off, q, wanted[2], dtype),
        sums_over_queries(weights_off, slope, wanted[3], dtype),
    )


def _output_off(
    weights: Tensor, grows: Tensor, scores_off: Tensor, unit: float, values: Tensor, out: Tensor
) -> Tensor:
    """Deviations of sum w v: w are rounded, and where a score is off by e the sum is by p e (grows v - out)."""
    squares = (weights * scores_off) ** 2
    apart = (squares * grows**2) @ values**2 - 2 * out * ((squares * grows) @ values)
    apart = apart + out**2 * squares.sum(-1, keepdim=True)
    return (apart.clamp(min=0) + (unit * weights * grows) ** 2 @ values**2).sqrt()


_BIGBIRD = scopes.BigBird(16, 1, 1, random.key(0, "bigbird"))
_BF16 = torch.bfloat16
OFTEN = ("strided, full, bf16", "fp16")
CASES: dict[str, Case] = {
    "window, grouped keys, documents, dropout": _case(
        scopes.Window(9), heads=(2, 1), documents=[[15, 20]], width=24, length=37, p=0.25
    ),
    "window, grouped keys, documents of two samples": _case(
        scopes.Window(20), heads=(4, 2), batch=2, documents=[[20, 23, 10], [50]], width=64, length=55
    ),
    "longformer": _case(scopes.Global(20, 3, True), False),
    "longformer, causal, bf16": _case(scopes.Global(20, 3, True), dtype=_BF16, width=64, length=200),
    "bigbird, dropout, grouped keys": _case(_BIGBIRD, heads=(2, 1), p=0.25, length=50),
    "bigbird, full, bf16": _case(_BIGBIRD, False, _BF16, width=80, length=130),
    "strided": _case(scopes.Strided(12), width=80, length=60),
    "strided, full, bf16": _case(scopes.Strided(12), False, _BF16, width=128, length=128),
    "dilated, bf16, dropout": _case(scopes.Dilated(6, 4), dtype=_BF16, p=0.1, length=90),
    "fixed, width 128": _case(scopes.Fixed(16, 2), width=128, length=70),
    "a comb, whose first rows see nothing": _case(scopes.Comb(8), width=40),
    "local, width 256, bf16": _case(scopes.Local(16, 1), False, _BF16, width=256, length=70),
    "width 256, padding": _case(scopes.Window(40), False, width=256, length=50, documents=[[30]]),
    "width 144, grouped keys, dropout": _case(scopes.Window(20), width=144, length=40, heads=(2, 1), p=0.25),
    "one row": _case(scopes.Window(4), length=1, heads=(1, 1), width=64),
    "scores of 10,000": _case(scopes.Global(20, 3, False), size=40.0, width=64),
    "fp16": _case(scopes.Global(20, 3, True), False, torch.float16, width=64),
}


# -- sizes ---------------------------------------------------------------------------------------------------------


def _compiled(width: int, dtype: torch.dtype) -> Callable[[], None]:
    """Documents, dropout and grouped keys at once, of tiles that are seen wholly and in part."""
    cpu = torch.device("cpu")
    return lambda: workload.call(cpu, scopes.Strided(64), 256, width, drops=True, dtype=dtype)


COMPILED = {
    f"width {width}, {name}": _compiled(width, dtype)
    for name, dtype in (("bf16", _BF16), ("fp32", torch.float32))
    for width in (32, 40, 64, 80, 128, 256)
}


class _Walk(NamedTuple):
    """Of all tiles of a layout: how many there are, how many of them in part, and how many places that exist lie in
    their walkers' blocks and in those on the other side."""

    tiles: int
    partial: int
    own: int
    other: int


def _walk(launch: Launch, mine: int, theirs: int) -> _Walk:
    given = launch.arguments
    tiles, length = given["tiles"], given["sizes"].queries
    partial = tiles.partial.numel()
    count = tiles.full.numel() + partial
    if tiles.full.is_meta:  # sizes that tiles divide
        return _Walk(count, partial, count * mine, count * theirs)
    own = 0
    for starts in (tiles.full_starts, tiles.partial_starts):
        own += sum(n * min(mine, length - i * mine) for i, n in enumerate(starts.diff().tolist()))
    others = torch.cat([tiles.full, tiles.partial]).tolist()
    return _Walk(count, partial, own, sum(min(theirs, length - j * theirs) for j in others))


def _walking(launch: Launch, by_keys: bool, own: int, tensors: int, rows: int) -> tuple[float, float]:
    """Bytes that all programs read as they walk, and products of one kind. A tile costs so many tensors of the own and
    of the other side, of the latter so many numbers a row, its block, its pattern, documents, and what dropout's mask
    depends on."""
    given = launch.arguments
    m, n, item = given["M"], given["N"], given["q"].data.element_size()
    walk = _walk(launch, n, m) if by_keys else _walk(launch, m, n)
    read = (walk.own * own + walk.other * tensors) * given["D"] * item + walk.other * rows * 4
    read += walk.tiles * 4 + walk.partial * (4 + 8 * m)
    if given["documents"] is not None:
        read += 4 * (walk.own + walk.other)
    if given["drop"] is not None:
        read += 16 * walk.tiles + 8 * (walk.other if by_keys else walk.own)
    heads = given["sizes"].batch * given["sizes"].heads
    lists = 4 * launch.programs + 16 * launch.programs * (given["group"] if by_keys else 1)
    return heads * read + lists, heads * walk.tiles * 2 * m * n * given["W"]


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _forward(launch: Launch) -> Cost:
    given = launch.arguments
    read, product = _walking(launch, False, 0, 2, 0)
    written = _bytes(given["out"].data) + _bytes(given["lse"])
    return Cost(
        read + _bytes(given["q"].data), written, once(launch), 2 * product, 2.5 * product / given["W"]
    )


def _query(launch: Launch) -> Cost:
    given = launch.arguments
    parts, share = columns(launch)
    read, product = _walking(launch, False, 2 * parts, 2 + parts, 0)
    read += sum(_bytes(given[name].data) for name in ("q", "out", "d_out")[parts:]) + _bytes(given["lse"])
    written = _bytes(given["d_q"].data) + _bytes(given["delta"])
    return Cost(read, written, once(launch), (1 + 2 * share) * product, 3 * product / given["W"])


def _key(launch: Launch) -> Cost:
    given = launch.arguments
    of_keys, of_values = given["OF_KEYS"], given["OF_VALUES"]
    parts, share = columns(launch)
    read, product = _walking(
        launch, True, (1 + of_keys) * parts, 1 + 2 * of_keys + of_values if parts else 2, 1 + of_keys
    )
    read += (1 + of_keys) * _bytes(given["k"].data) * (not parts)
    written = of_keys * _bytes(given["d_k"].data) + of_values * _bytes(given["d_v"].data)
    products = (share * (1 + of_keys) + of_keys + of_values) * product
    return Cost(read, written, once(launch), products, 3 * product / given["W"])


COSTS = {
    "block_sparse_forward_kernel": _forward,
    "block_sparse_query_kernel": _query,
    "block_sparse_key_kernel": _key,
}
