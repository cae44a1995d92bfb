"""Adafactor: Adam's second moment as the product of a row and a column (Shazeer and Stern 2018).

Shapes: matrices [..., R, C], of which dims before the last two are batches; `rows` [..., R, 1], `columns`
[..., 1, C].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from headway.pretrain.optim.norms import square_sum
from headway.pretrain.optim.sharded import axes, is_spread, local, reduced, summed

EPS_SQUARE = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""
EPS_SCALE = 1e-3
"""Least root mean square of a parameter that its steps are in proportion to (epsilon 2)."""


class Adafactor(torch.optim.Optimizer):
    """Adafactor as T5 trains with it, algorithms 4 and 5 of arXiv:1804.04235: no first moment, beta2 = 1 - t^-0.8.

        V = rows x columns / mean(rows), moving averages of the squared gradient's means over the other dim
        U = G / sqrt(V)
        w <- w (1 - lr x weight_decay) - lr x max(1e-3, RMS(w)) x U / max(1, RMS(U) / clip)

    The learning rate is the caller's, not the paper's min(0.01, 1 / sqrt(t)). Vectors and scalars keep a whole
    second moment. Means are over whole parameters, wherever their parts are; they cost three small
    all-reduces a step for each distinct mesh and way of spreading. State is free of the layout: a factor is
    spread as its parameter is along the dim that it keeps.

    With so small an epsilon, a gradient that is nothing but rounding (of the keys' bias, which softmax cancels)
    moves its parameter like any other, differently at every layout; the loss does not see it.

    (`torch.optim.Adafactor` caps the rate at 1 / sqrt(t) and sends some five messages for each parameter.)

    Args:
        params: parameters, plain, named or in groups.
        lr: learning rate, relative to a parameter's root mean square.
        weight_decay: decoupled decay.
        clip: largest root mean square of U.
        decay: exponent of beta2's schedule.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        decay: float = 0.8,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "clip": clip, "decay": decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' gradients; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        params = [p for p, _ in moved]
        gradients = [local(g) for g in reduced(p.grad for p in params)]
        weights = [local(p) for p in params]
        self._update_moments(moved, gradients)
        roots = self._inverse_roots(params)
        # U is computed twice, not kept: a step needs memory for one parameter more, not for all.
        squares = [square_sum([_product(g, r)]) for g, r in zip(gradients, roots, strict=True)]
        squares += [square_sum([w]) for w in weights]
        squares = summed(squares, [axes(p) for p in params] * 2)
        for i, (p, group) in enumerate(moved):
            update_rms, weight_rms = ((s / max(1, p.numel())).sqrt() for s in squares[i :: len(moved)])
            lr = float(group["lr"])
            step = weight_rms.clamp(min=EPS_SCALE) / (update_rms / group["clip"]).clamp(min=1.0)
            weights[i].mul_(1 - lr * group["weight_decay"])
            weights[i].addcmul_(_product(gradients[i], roots[i]), step.to(p.dtype), value=-lr)
        return loss

    def _update_moments(self, moved: list[tuple[Tensor, dict[str, Any]]], gradients: list[Tensor]) -> None:
        """Take the squared gradients into the moving averages; one all-reduce for all their sums."""
        targets: list[tuple[Tensor, int, float]] = []  # moving average, elements of a mean, share of the new
        sums, over = [], []
        for (p, group), gradient in zip(moved, gradients, strict=True):
            state = self._state(p)
            state["step"] += 1
            share = float(state["step"]) ** -group["decay"]
            square = gradient.square()
            for key, dim in _means(p):
                sums.append(square if dim is None else square.sum(dim, keepdim=True))
                over.append(None if dim is None else axes(p, dim))
                targets.append((local(state[key]), 1 if dim is None else p.shape[dim], share))
        for total, (average, count, share) in zip(summed(sums, over), targets, strict=True):
            average.lerp_(total / count + EPS_SQUARE, share)

    def _inverse_roots(self, params: list[Tensor]) -> list[list[Tensor]]:
        """Factors of 1 / sqrt(V): of rows and of columns, or one for all elements of a vector."""
        matrices = [p for p in params if p.ndim >= 2]
        rows = [local(self.state[p]["rows"]) for p in matrices]
        sums = [r.sum(-2, keepdim=True) for r in rows]
        sums = summed(sums, [axes(p, p.ndim - 2) for p in matrices])
        by_row = {p: (r * p.shape[-2] / s).rsqrt_() for p, r, s in zip(matrices, rows, sums, strict=True)}
        return [
            [by_row[p], local(self.state[p]["columns"]).rsqrt()]
            if p.ndim >= 2
            else [local(self.state[p]["variance"]).rsqrt()]
            for p in params
        ]

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, so that reading it does not wait for the device
            for key, dim in _means(p):
                state[key] = torch.zeros_like(p) if dim is None else _zeros_without(p, dim)
        return state


def _means(p: Tensor) -> list[tuple[str, int | None]]:
    """Averages of the squared gradient that are kept: names, and the dim that a mean is taken over."""
    return [("rows", p.ndim - 1), ("columns", p.ndim - 2)] if p.ndim >= 2 else [("variance", None)]


def _product(gradient: Tensor, roots: list[Tensor]) -> Tensor:
    update = gradient * roots[0]
    return update if len(roots) == 1 else update.mul_(roots[1])


def _zeros_without(p: Tensor, dim: int) -> Tensor:
    """Zeros of the parameter's shape but 1 in a dim, spread as the parameter is, but whole in that dim."""
    part = local(p)
    zeros = part.new_zeros([1 if d == dim else n for d, n in enumerate(part.shape)])
    if not is_spread(p):
        return zeros
    from torch.distributed.tensor import DTensor, Replicate

    placements = [Replicate() if getattr(q, "dim", None) == dim else q for q in p.placements]
    like = torch.empty([1 if d == dim else n for d, n in enumerate(p.shape)], device="meta")
    return DTensor.from_local(
        zeros, p.device_mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )
