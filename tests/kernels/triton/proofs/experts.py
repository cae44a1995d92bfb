"""Moves of rows into experts' groups and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from headway.kernels import grouped
from headway.kernels.triton.experts import combine_rows, copies, places, take_rows
from headway.tests.kernels.triton.launches import Launch
from headway.tests.kernels.triton.proof import Case, Cost, Result, drawn, once, seed

ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def _case(
    tokens: int,
    width: int,
    dtype: torch.dtype,
    experts: int = 5,
    each: int = 2,
    multiple: int = 16,
    left_out: float = 0.0,
    scale: float = 1.0,
) -> Case:
    """Pairs of every token with `each` experts, of which a part is left out; rows go in, are doubled, and come back."""

    def compute(device: torch.device) -> Mapping[str, Result]:
        draw = torch.Generator().manual_seed(seed())
        token_P = torch.arange(tokens).repeat_interleave(each)
        expert_P = torch.randint(0, experts, (tokens * each,), generator=draw)
        expert_P[torch.rand(expert_P.shape, generator=draw) < left_out] = experts
        x, d_y = (drawn(draw, tokens, width, dtype=dtype).detach() * scale for _ in range(2))
        weight_P = torch.rand(tokens * each, generator=draw)
        at = places(expert_P.to(device), experts, multiple)
        token_R = at.of_rows(token_P.to(device), -1)
        mine = copies(token_R, tokens)
        ours = x.clone().to(device).requires_grad_(), weight_P.clone().to(device).requires_grad_()
        rows = take_rows(ours[0], token_R, mine)
        rows.retain_grad()
        y = combine_rows(rows * 2, at.of_rows(ours[1]), token_R, mine)  # a factor of 2 rounds nothing
        y.backward(d_y.to(device))
        assert rows.grad is not None
        assert _are_grouped(at.ends_X, at.row_P, expert_P, multiple)

        wide = x.double().requires_grad_(), weight_P.double().requires_grad_()
        filled = (token_R >= 0).cpu()
        known = torch.arange(at.rows)[filled]
        back = torch.empty(at.rows + 1, dtype=torch.int64).scatter(
            0, at.row_P.cpu(), torch.arange(len(expert_P))
        )
        pair = back[known]
        taken = grouped.take_rows(wide[0], token_P[pair])
        taken.retain_grad()
        y_64 = grouped.combine_rows(taken * 2, wide[1][pair], token_P[pair], tokens)
        y_64.backward(d_y.double())
        rows_64, d_rows_64 = (x.new_zeros(at.rows, width, dtype=torch.float64) for _ in range(2))
        rows_64[known], d_rows_64[known] = taken.detach(), taken.grad  # type: ignore[assignment]
        top = float(d_y.abs().max())
        products = 2 * width * top * float(x.abs().max())
        return {
            "rows": Result(rows, rows_64, 0.0),
            "y": Result(y, y_64, _tolerance(y_64, dtype, 2 * each * float(x.abs().max()))),
            "d_rows": Result(rows.grad, d_rows_64, _tolerance(d_rows_64, dtype, 2 * top)),
            # Gradients of rows were rounded before they are added.
            "d_x": Result(
                _grad(ours[0]), _grad(wide[0]), (each + 1) * _tolerance(_grad(wide[0]), dtype, 2 * each * top)
            ),
            "d_weight": Result(_grad(ours[1]), _grad(wide[1]), 4 * 2.0**-24 * products),
        }

    return compute


def _are_grouped(ends_X: Tensor, row_P: Tensor, expert_P: Tensor, multiple: int) -> bool:
    """Whether groups end at multiples, and pairs stand in their experts' groups, each in a row of its own."""
    known = expert_P < len(ends_X)
    row = row_P.cpu()[known]
    own = torch.searchsorted(ends_X.cpu(), row, right=True) == expert_P[known]
    return bool((ends_X % multiple == 0).all() and own.all()) and len(row.unique()) == len(row)


def _grad(x: Tensor) -> Tensor:
    assert x.grad is not None
    return x.grad


def _tolerance(wanted: Tensor, dtype: torch.dtype, size: float) -> float:
    """Rounded once to the dtype, after some sums in fp32 of numbers that are together no larger than `size`."""
    return float(wanted.detach().abs().max()) * ROUNDING[dtype] + size * 8 * 2.0**-24


OFTEN = ("fp16", "pairs left out")
CASES: dict[str, Case] = {
    f"{tokens} x {width}, {dtype}": _case(tokens, width, dtype)
    for tokens, width in ((1, 40), (37, 64), (50, 80), (21, 600))
    for dtype in (torch.float32, torch.bfloat16)
} | {
    "one expert each": _case(29, 64, torch.float32, each=1),
    "six experts each": _case(19, 64, torch.bfloat16, each=6),
    "many experts": _case(11, 40, torch.float32, experts=40),
    "one group": _case(33, 40, torch.float32, experts=1),
    "no padding": _case(33, 40, torch.float32, multiple=1),
    "pairs left out": _case(33, 64, torch.float32, left_out=0.5),
    "no pair": _case(9, 64, torch.float32, left_out=1.1),
    "large numbers": _case(33, 64, torch.float32, scale=1e4),
    "fp16": _case(33, 64, torch.float16),
}


def _filled(token: Tensor) -> int:
    """Rows that stand for a token; all, where their tokens are not known."""
    return len(token) if token.is_meta else int((token >= 0).sum())


def _take(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["x"].element_size()
    blocks = -(-width // given["C"])
    return Cost(
        _filled(given["token"]) * width * item + 8 * rows * blocks, rows * width * item, once(launch), 0, 0
    )


def _combine(launch: Launch) -> Cost:
    given = launch.arguments
    width, item, start = given["width"], given["y"].element_size(), given["start"]
    count, blocks = len(start) - 1, -(-width // given["C"])
    rows = len(given["row"]) if start.is_meta else int(start[-1] - start[0])
    number = 8 + (0 if given["weight"] is None else given["weight"].element_size())
    read = rows * (width * item + number * blocks) + 16 * launch.programs
    return Cost(read, count * width * item, once(launch), 0, 2 * rows * width)


def _spread(launch: Launch) -> Cost:
    given = launch.arguments
    rows, width, item = given["rows"], given["width"], given["y"].element_size()
    weights = rows * given["weight"].element_size()
    read = 2 * _filled(given["token"]) * width * item + rows * 8 + weights
    return Cost(read, rows * width * item + weights, once(launch), 0, 3 * rows * width)


COSTS = {
    "experts_take_kernel": _take,
    "experts_combine_kernel": _combine,
    "experts_spread_kernel": _spread,
}
