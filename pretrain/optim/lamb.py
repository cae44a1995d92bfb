"""LAMB: Adam whose step for each layer has a length in proportion to the layer's weights (You et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.pretrain.optim.norms import whole_square_sums
from headway.pretrain.optim.sharded import local, reduced


class Lamb(torch.optim.Optimizer):
    """LAMB, algorithm 2 of You et al. 2020 (arXiv:1904.00962) with debiased moments and phi the identity.

        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay x w
        w <- w - lr x |w| / |r| x r

    The ratio of norms, of Frobenius, is 1 if one of them is 0, and where a group's `adapt` is false: in the
    authors' code and in timm's `Lamb` those are the parameters that do not decay. A "layer" is a parameter,
    whole, wherever its parts are; a stack of experts is one.

    The norms of all parameters are summed over ranks together, by one all-reduce for each distinct mesh and
    way of spreading. Between moments and that all-reduce, a step holds one more tensor for each parameter.

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
        adapted = [move for move in moves if move.adapt]
        likes = [p for move in adapted for p in move.params]
        weights = [w for move in adapted for w in move.weights]
        updates = [u for move in adapted for u in move.updates]
        squares = whole_square_sums(weights + updates, likes + likes)
        ratios = iter(map(_trust_ratio, squares[: len(likes)], squares[len(likes) :]))
        for move in moves:
            if not move.adapt:
                torch._foreach_add_(move.weights, move.updates, alpha=-move.lr)
                continue
            for weight, update in zip(move.weights, move.updates, strict=True):
                weight.addcmul_(update, next(ratios).to(update.dtype), value=-move.lr)
        return loss

    def _move(self, group: dict[str, Any]) -> _Move:
        """Take the gradients of a group into its moments; its updates before any ratio."""
        params = [p for p in group["params"] if p.grad is not None]
        states = [self._state(p) for p in params]
        gradients = [local(g) for g in reduced(p.grad for p in params)]
        means = [local(s["exp_avg"]) for s in states]
        squares = [local(s["exp_avg_sq"]) for s in states]
        weights = [local(p) for p in params]
        beta1, beta2 = group["betas"]
        for state in states:
            state["step"] += 1
        steps = [float(state["step"]) for state in states]
        move = _Move(float(group["lr"]), group["adapt"], params, weights, [])
        if not params:
            return move
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, [math.sqrt(1 - beta2**t) for t in steps])
        torch._foreach_add_(roots, group["eps"])
        move.updates = list(torch._foreach_div(means, [1 - beta1**t for t in steps]))
        torch._foreach_div_(move.updates, roots)
        if group["weight_decay"]:
            torch._foreach_add_(move.updates, weights, alpha=group["weight_decay"])
        return move

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[p]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, so that reading it does not wait for the device
            state["exp_avg"] = torch.zeros_like(p)
            state["exp_avg_sq"] = torch.zeros_like(p)
        return state


@dataclass
class _Move:
    """What one group is about to do: local parts of its weights, and of what they are moved by."""

    lr: float
    adapt: bool
    params: list[Tensor]
    weights: list[Tensor]
    updates: list[Tensor]


def _trust_ratio(weight_square: Tensor, update_square: Tensor) -> Tensor:
    """|w| / |r|, or 1 where one of them is 0."""
    ratio = (weight_square / update_square).sqrt()
    return torch.where((weight_square > 0) & (update_square > 0), ratio, 1.0)
