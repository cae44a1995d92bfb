"""FlashAttention 3 and 4 (Shah et al. 2024; Tri Dao's packages), in the seat that PyTorch's own kernel keeps for them.

Asked for by name alone: PyTorch wants them chosen, not found. For GPUs of compute capability 9 (FA4: or 10), fp16 and
bf16, causal or full. Never run by this project's tests, which have no such package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias

PACKAGES = {"fa3": "flash_attn_interface", "fa4": "flash_attn.cute.interface"}
"""Kernel -> the module that PyTorch takes it from."""


@torch.compiler.assume_constant_result
def unavailable(name: str) -> str | None:
    """Why a kernel cannot be had here, or None if it can."""
    module = PACKAGES[name]
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        found = False
    if not found:
        return f"it needs the module {module}, which is not installed"
    if name.upper() not in torch.nn.attention.list_flash_attention_impls():
        return f"PyTorch {torch.__version__} has no seat for it"
    return None


@cache
def activate(name: str) -> None:
    """Let PyTorch's flash kernel be this one, from now on."""
    torch.nn.attention.activate_flash_attention_impl(name.upper())


def attention(name: str) -> Callable[..., Tensor]:
    """Dense attention by `name`; see `dense.reference`."""

    def compute(
        q_BHQD: Tensor,
        k_BKSD: Tensor,
        v_BKSD: Tensor,
        mask: Mask,
        dropout: WeightDropout | None = None,
        scale: float | None = None,
        bias_HQK: Bias | None = None,
    ) -> Tensor:
        from headway.kernels.attention.choose import KernelUnavailable

        assert dropout is None
        assert bias_HQK is None
        if mask.documents is not None or mask.prefix is not None or mask.shift is not None:
            raise KernelUnavailable(name, "it separates no documents, padding or prefixes", "auto")
        activate(name)
        grouped = q_BHQD.shape[1] != k_BKSD.shape[1]
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                q_BHQD, k_BKSD, v_BKSD, is_causal=mask.causal, scale=scale, enable_gqa=grouped
            )

    return compute
