"""Muon: momentum, orthogonalised, for the matrices of hidden layers (Jordan et al. 2024).

https://kellerjordan.github.io/posts/muon/. Shapes: `b` matrices of one shape at once, `m` <= `n` their sides.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from headway.kernels.fused import fused
from headway.pretrain.optim.sharded import local, reduced, share, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic: the slope at zero is as steep as it can be while singular values end within 0.7 to 1.2."""

CHUNK = 1 << 26
"""Elements that are orthogonalised at once; bounds the memory of stacked copies to a few times this."""


FUSED_FROM = 256
"""m from which Triton's kernels are for, which compute half of the symmetric products; below, and in fp32, PyTorch's
batched products are as good."""


def orthogonalise(x_bmn: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """Nearly the closest semi-orthogonal matrices: U V^T for x = U S V^T, with singular values near 1.

    The quintic Newton-Schulz iteration X <- a X + (b A + c A^2) X with A = X X^T, after scaling to Frobenius
    norm 1. Computed in the dtype that is given; m <= n keeps A small.

    Args:
        x_bmn: matrices [b, m, n] with m <= n.
        steps: iterations.
        eps: least norm, so that zero stays zero.
    """
    if x_bmn.shape[1] >= FUSED_FROM and x_bmn.dtype in (torch.bfloat16, torch.float16) and fused(x_bmn):
        from headway.kernels.triton import muon as fast

        return fast.orthogonalise(x_bmn, COEFFICIENTS, steps, eps)
    a, b, c = COEFFICIENTS
    norm_dtype = torch.promote_types(x_bmn.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x_bmn, dim=(1, 2), keepdim=True, dtype=norm_dtype)
    x_bmn = x_bmn / norm.clamp(min=eps).to(x_bmn.dtype)
    for _ in range(steps):
        gram_bmm = torch.bmm(x_bmn, x_bmn.mT)
        poly_bmm = torch.baddbmm(gram_bmm, gram_bmm, gram_bmm, beta=b, alpha=c)
        x_bmn = torch.baddbmm(x_bmn, poly_bmm, x_bmn, beta=a)
    return x_bmn


def fast_dtype(parameter: Tensor) -> torch.dtype:
    """Dtype in which orthogonalising this parameter is fast and still good.

    fp64 for fp64; bf16 where products have matrix units for it (CUDA from Ampere on, Intel AMX: 3 to 6 times
    as fast as fp32, batched), else fp32.
    """
    if parameter.dtype == torch.float64:
        return torch.float64
    if parameter.device.type == "cuda":
        fast = torch.cuda.get_device_capability(parameter.device) >= (8, 0)
    else:
        fast = parameter.device.type == "cpu" and _cpu_has_amx()
    return torch.bfloat16 if fast else torch.float32


class Muon(torch.optim.Optimizer):
    """Muon for matrices; each step moves them by lr x sqrt(max(1, rows / columns)) x orthogonalised momentum.

    That factor is the original's (`adjust_lr_fn="original"` of `torch.optim.Muon`, whose momentum and decay
    these are too); it keeps the root mean square of what a layer's output changes by independent of the
    layer's shape. Weight decay is decoupled: w <- w (1 - lr x weight_decay).

    Matrices of one shape, or its transpose, are orthogonalised together in batched products. Leading dims (of
    experts) are batches of matrices. A parameter that is spread over ranks is gathered, orthogonalised whole
    on every rank, and each rank applies its share: the step is the one of a single device.

    Args:
        params: parameters of two dims or more, plain, named or in groups.
        lr: learning rate.
        momentum: share of the old momentum; Nesterov's form is used.
        weight_decay: decoupled decay.
        steps: Newton-Schulz iterations.
        dtype: of the iterations; None chooses by `fast_dtype`.

    Raises:
        ValueError: a parameter with fewer than two dims.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        steps: int = 5,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )
        self.dtype = dtype
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim < 2:
                raise ValueError(f"Muon moves matrices: a parameter of shape {tuple(p.shape)} is none")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the parameters' gradients; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(group, params)
        return loss

    def _step(self, group: dict[str, Any], params: list[Tensor]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        gradients = [local(g) for g in reduced(p.grad for p in params if p.grad is not None)]
        buffers = [local(self.state[p]["momentum_buffer"]) for p in params]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch._foreach_lerp(gradients, buffers, momentum)
        weights = [local(p) for p in params]
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        for batch in _batches(params):
            whole_updates = self._orthogonalised(
                [params[i] for i in batch], [updates[i] for i in batch], group
            )
            for i, update in zip(batch, whole_updates, strict=True):
                rows, columns = params[i].shape[-2:]
                scale = math.sqrt(max(1.0, rows / columns))
                weights[i].add_(share(update, params[i]).to(weights[i].dtype), alpha=-lr * scale)

    def _orthogonalised(
        self, params: list[Tensor], updates: list[Tensor], group: dict[str, Any]
    ) -> list[Tensor]:
        """Whole orthogonalised updates of parameters whose shapes agree up to a transposition."""
        dtype = self.dtype or fast_dtype(params[0])
        full = [whole(update.to(dtype), p) for update, p in zip(updates, params, strict=True)]
        wide = [x.mT if _tall(x) else x for x in full]
        x_bmn = torch.cat([x.reshape(-1, *x.shape[-2:]) for x in wide])
        parts = orthogonalise(x_bmn, group["steps"]).split([x.shape[:-2].numel() for x in wide])
        done = [part.reshape(x.shape) for part, x in zip(parts, wide, strict=True)]
        return [y.mT if _tall(x) else y for y, x in zip(done, full, strict=True)]


def _cpu_has_amx() -> bool:
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # not in every torch of the supported range
    return bool(capabilities is not None and capabilities().get("amx_bf16"))


def _tall(x: Tensor) -> bool:
    return x.shape[-2] > x.shape[-1]


def _batches(params: list[Tensor]) -> list[list[int]]:
    """Positions of parameters that are orthogonalised together: up to CHUNK elements, or one parameter."""
    alike: dict[tuple[Any, ...], list[list[int]]] = defaultdict(list)
    room: dict[tuple[Any, ...], int] = {}
    for i, p in enumerate(params):
        key = (*sorted(p.shape[-2:]), p.dtype, p.device)
        if p.numel() > room.get(key, 0):
            alike[key].append([])
            room[key] = CHUNK
        alike[key][-1].append(i)
        room[key] -= p.numel()
    return [batch for batches in alike.values() for batch in batches]
