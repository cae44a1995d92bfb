"""LAMB: Adam whose step for each layer has a length in proportion to the layer's weights (You et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels.fused import fused
from headway.pretrain.optim.norms import whole_square_sums
from headway.pretrain.optim.sharded import axes, local, reduced, summed


class Lamb(torch.optim.Optimizer):
    """LAMB, algorithm 2 of You et al. 2020 (arXiv:1904.00962) with debiased moments and phi the identity.

        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x w
        w <- w - lr x |w| / |r| x r

    The ratio of norms, of Frobenius, is 1 if one of them is 0, and where a group's `adapt` is false: in the
    authors' code and in timm's `Lamb` those are the parameters that do not decay. A "layer" is a parameter,
    whole, wherever its parts are; a stack of experts is one.

    The norms of all parameters are summed over ranks together, by one all-reduce for each distinct mesh and
    way of spreading. Between moments and that all-reduce, a step holds one more tensor for each parameter, but for
    Triton's kernels on GPUs, which compute it twice.

    Args:
        params: parameters, plain, named or in groups.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment; above 0.
        weight_decay: inside of the ratio, but not of the moments.
        adapt: scale steps by the ratio of norms.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        adapt: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' gradients; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moves = [self._move(group) for group in self.param_groups]
        if any(move.params for move in moves):
            (_by_triton if all(move.fused for move in moves) else _by_torch)(moves)
        return loss

    def _move(self, group: dict[str, Any]) -> _Move:
        """What a group's step is made of; counts the step."""
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p) for p in params]
        for state in states:
            state["step"] += 1
        return _Move(
            group,
            params,
            weights=[local(p) for p in params],
            gradients=[local(g) for g in reduced(p.grad for p in params)],
            means=[local(s["exp_avg"]) for s in states],
            squares=[local(s["exp_avg_sq"]) for s in states],
            steps=[s["step"] for s in states],
        )

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, so that reading it does not wait for the device
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


class _Move(NamedTuple):
    """What one group is about to do: its settings, parameters, and local parts of all that a step reads."""

    group: dict[str, Any]
    params: list[Tensor]
    weights: list[Tensor]
    gradients: list[Tensor]
    means: list[Tensor]
    squares: list[Tensor]
    steps: list[Tensor]

    @property
    def fused(self) -> bool:
        """Whether Triton's kernels take it: lists of one dtype each, on a GPU."""
        lists = self.weights, self.gradients, self.means, self.squares
        alike = all(len({x.dtype for x in tensors}) <= 1 for tensors in lists)
        return alike and all(x.is_contiguous() and fused(x) for tensors in lists for x in tensors)


def _by_torch(moves: list[_Move]) -> None:
    """The step by PyTorch's operators on lists."""
    found = [(move, _updates(move)) for move in moves]
    adapted = [(move, updates) for move, updates in found if move.group["adapt"]]
    likes = [p for move, _ in adapted for p in move.params]
    weights = [w for move, _ in adapted for w in move.weights]
    every = [u for _, updates in adapted for u in updates]
    squares = whole_square_sums(weights + every, likes + likes)
    ratios = iter(map(_trust_ratio, squares[: len(likes)], squares[len(likes) :]))
    for move, updates in found:
        rate = -float(move.group["lr"])
        if not move.group["adapt"]:
            torch._foreach_add_(move.weights, updates, alpha=rate)
            continue
        for weight, update in zip(move.weights, updates, strict=True):
            weight.addcmul_(update, next(ratios).to(update.dtype), value=rate)


def _updates(move: _Move) -> list[Tensor]:
    """Takes a group's gradients into its moments; its updates before any ratio."""
    if not move.params:
        return []
    group, steps = move.group, [float(step) for step in move.steps]
    beta1, beta2 = group["betas"]
    torch._foreach_lerp_(move.means, move.gradients, 1 - beta1)
    torch._foreach_mul_(move.squares, beta2)
    torch._foreach_addcmul_(move.squares, move.gradients, move.gradients, value=1 - beta2)
    roots = torch._foreach_sqrt(move.squares)
    torch._foreach_div_(roots, [math.sqrt(1 - beta2**t) for t in steps])
    torch._foreach_add_(roots, group["eps"])
    updates = list(torch._foreach_div(move.means, [1 - beta1**t for t in steps]))
    torch._foreach_div_(updates, roots)
    if group["weight_decay"]:
        torch._foreach_add_(updates, move.weights, alpha=group["weight_decay"])
    return updates


def _by_triton(moves: list[_Move]) -> None:
    """The step by three launches a group, in 40 bytes an element instead of 108; no updates are kept."""
    from headway.kernels.triton import lamb as fast

    def settings(move: _Move) -> dict[str, Any]:
        beta1, beta2 = move.group["betas"]
        return {"beta1": beta1, "beta2": beta2} | {k: move.group[k] for k in ("weight_decay", "eps")}

    own = [
        fast.lamb_squares(m.weights, m.gradients, m.means, m.squares, m.steps, **settings(m)) for m in moves
    ]
    adapted = [(m, squares) for m, squares in zip(moves, own, strict=True) if m.group["adapt"]]
    parts = [square_2.double() for _, squares_T2 in adapted for square_2 in squares_T2]
    whole = iter(summed(parts, [axes(p) for m, _ in adapted for p in m.params]))
    for m in moves:
        ratios = (
            torch.stack([next(whole) for _ in m.params]).float() if m.group["adapt"] and m.params else None
        )
        fast.lamb_step(m.weights, m.means, m.squares, m.steps, ratios, lr=float(m.group["lr"]), **settings(m))


def _trust_ratio(weight_square: Tensor, update_square: Tensor) -> Tensor:
    """|w| / |r|, or 1 where one of them is 0."""
    ratio = (weight_square / update_square).sqrt()
    return torch.where((weight_square > 0) & (update_square > 0), ratio, 1.0)
