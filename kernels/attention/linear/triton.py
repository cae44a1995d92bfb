"""`featured.average` by Triton's kernels, on GPUs: causal, in fp32 or bf16.

Features are written out, once for all, in the dtype of values: a product of tensor cores reads them.

Shapes: B batch, H query heads, K key/value heads, S tokens, M features, D head dimension.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from headway.kernels.attention.linear.featured import Map, running_max
from headway.kernels.attention.linear.scan import exactly, operand_dtype
from headway.kernels.attention.masks import Mask


def average(
    maps: Map,
    q_BHSD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    w_HMD: Tensor | None = None,
    peak_BHS: Tensor | None = None,
    floor: float = 0,
) -> Tensor:
    """See `featured.average`.

    Raises:
        KernelUnavailable: the mask is not causal, or values are of fp64.
    """
    from headway.kernels.triton.linear_attention import linear_attention

    level_BHS = None if peak_BHS is None else running_max(peak_BHS.detach(), mask.documents)
    dtype = operand_dtype(v_BKSD)
    phi_q, phi_k = (
        _Features.apply(maps, x, w_HMD, level_BHS, of_keys).to(dtype)
        for x, of_keys in ((q_BHSD, False), (k_BKSD, True))
    )
    return linear_attention(phi_q, phi_k, v_BKSD.to(dtype), mask, level_BHS, floor).to(v_BKSD.dtype)


class _Features(torch.autograd.Function):
    """Features [B, H, S, M] of queries or keys, by a map and its own derivative."""

    @staticmethod
    def forward(
        ctx: Any, maps: Map, x: Tensor, w: Tensor | None, level: Tensor | None, of_keys: bool
    ) -> Tensor:
        w_1HMD = None if w is None else w[None]
        with exactly(x):
            if of_keys:
                phi = maps.keys(x, w_1HMD, None if level is None else level[..., None])
            else:
                phi = maps.queries(x, w_1HMD)
        ctx.save_for_backward(x, phi, w)
        ctx.maps, ctx.of_keys = maps, of_keys
        return phi

    @staticmethod
    def backward(ctx: Any, d_phi: Tensor) -> Any:
        x, phi, w = ctx.saved_tensors
        with exactly(x):
            dx, dw = ctx.maps.pull(x, phi, d_phi, None if w is None else w[None], ctx.of_keys)
        return None, dx, None if dw is None else dw[0], None, None
