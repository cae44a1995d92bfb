"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), statistics in fp32 or wider.

Compiled blocks fuse them with what is around them; elsewhere on GPUs a Triton kernel does, with the residual sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.fused import fused


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim; [..., E] -> [..., E].

    Computed in fp32 (fp64 for fp64) whatever the dtypes are; returns that wide dtype.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(
        x.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; dtypes as in `layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x, weight = x.to(wide), weight.to(wide)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        normed: Tensor = _RMSNorm.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, weight.shape, weight, eps)


def of_sum(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """The norm of x + added, and that sum: the residual stream, both in its dtype.

    Args:
        x: the stream, [..., E], at least as wide as `added`; without `added` the sum is x itself.
        weight, bias: [E]; a bias if `centred` alone.
        centred: LayerNorm, else RMSNorm.
    """
    keeps = added is None or torch.promote_types(x.dtype, added.dtype) == x.dtype
    if keeps and x.shape[-1] <= WIDEST and fused(x, added, weight, bias):
        from headway.kernels.triton import norm as fast

        return fast.norm(x, weight, bias, eps=eps, centred=centred, residual=added)
    total = x if added is None else x + added
    normed = layer_norm(total, weight, bias, eps) if centred else rms_norm(total, weight, eps)
    return normed.to(total.dtype), total


WIDEST = 32768
"""E at most that a program of Triton's kernel holds in registers."""


class _RMSNorm(torch.autograd.Function):
    """In few passes over memory: PyTorch's own is not fused on CPU, and takes 1.7 times as long (4096 x 256, fp32)."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        unit = x * inverse
        ctx.save_for_backward(unit, inverse, weight)
        return unit * weight

    @staticmethod
    def backward(ctx, d_out):
        unit, inverse, weight = ctx.saved_tensors
        product = d_out * unit
        d_weight = product.flatten(0, -2).sum(0)
        mean = product.mul_(weight).mean(-1, keepdim=True)
        d_x = torch.addcmul(d_out * weight, unit, mean, value=-1).mul_(inverse)
        return d_x, d_weight, None
