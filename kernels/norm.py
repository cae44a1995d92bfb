"""LayerNorm (Ba et al. 2016) and RMSNorm (Zhang and Sennrich 2019), statistics in fp32 or wider."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dim; [..., E] -> [..., E].

    Computed in fp32 (fp64 for fp64) whatever the dtypes are; returns that wide dtype, and the caller narrows.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(
        x.to(wide), weight.shape, weight.to(wide), None if bias is None else bias.to(wide), eps
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; dtypes as in `layer_norm`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(wide), weight.shape, weight.to(wide), eps)
