"""The choice of a kernel: an explicit request is honoured or refused, `auto` takes the fastest that is right."""

from __future__ import annotations

import torch

from headway.kernels.attention import cpp
from headway.kernels.attention.registry import Kernel, Mechanism
from headway.kernels.attention.registry import mechanism as by_name

ANYWHERE = "anywhere"
"""In place of a device that is not known yet."""

SHORT = 192
"""Keys up to which row blocks beat PyTorch's kernel in bf16 on CPU, where blocks are not compiled."""


class KernelUnavailable(ValueError):
    """A kernel that was asked for cannot compute what was asked.

    Attributes:
        value: the request.
        rule: what must hold.
        nearest: a kernel that can.
    """

    def __init__(self, value: str, rule: str, nearest: str) -> None:
        self.value, self.rule, self.nearest = value, rule, nearest
        super().__init__(f"attention kernel {value!r}: {rule}; nearest legal choice: {nearest}")


def choose(
    mechanism: str | Mechanism,
    request: str = "auto",
    *,
    dropout: bool = False,
    bias: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    compiled: bool = False,
    keys: int | None = None,
    described: bool = False,
) -> Kernel:
    """The kernel that computes `mechanism` here.

    Args:
        mechanism: what it computes, or the registered word, or several joined by "+".
        request: a kernel's name, which is never replaced, or `auto`.
        dropout: whether attention weights are dropped.
        bias: whether a bias is added to the scores.
        device, dtype: where the queries live (`ANYWHERE` if it is not known), and what they are.
        compiled: whether torch.compile traces this call.
        keys: that a query may see at most; many, if not given.
        described: whether the bias is one that follows from places.

    Raises:
        KernelUnavailable: the request is unknown or cannot do what is asked.
    """
    row = by_name(mechanism) if isinstance(mechanism, str) else mechanism
    kernels = row.kernels
    if request == "auto":
        plain, generated = _dense(row), (described or not bias) and dtype != torch.float64
        if device == "cuda" and "flex" in kernels and generated and not dropout and (described or not plain):
            return kernels["flex"]
        if device == "cpu" and "cpp" in kernels and generated and cpp.unavailable(dtype) is None:
            return kernels["cpp"]
        if plain:
            return kernels[_fastest(dropout, bias or row.narrow, device, dtype, compiled, keys)]
        return [kernel for kernel in row.kernels_on("cpu").values() if kernel.name != "cpp"][-1]
    if request not in kernels:
        raise KernelUnavailable(request, f"{row.name} attention has the kernels {', '.join(kernels)}", "auto")
    if device not in (*kernels[request].devices, ANYWHERE):
        rule = f"it runs on {' and '.join(kernels[request].devices)}, forward and backward, not on {device}"
        raise KernelUnavailable(request, rule, "auto")
    if request == "cpp" and (reason := cpp.unavailable(dtype)):
        raise KernelUnavailable(request, reason, "blocks")
    if dropout and not kernels[request].dropout:
        nearest = next(k.name for k in reversed(kernels.values()) if k.dropout)
        rule = "its dropout of attention weights would depend on the layout, so it takes none"
        raise KernelUnavailable(request, rule, nearest)
    if bias and not kernels[request].bias and not (described and kernels[request].slopes):
        nearest = next(k.name for k in reversed(kernels.values()) if k.bias and k.dropout >= dropout)
        raise KernelUnavailable(request, "it computes no bias of the scores", nearest)
    return kernels[request]


def _dense(row: Mechanism) -> bool:
    """Whether every pair is seen, so that PyTorch's kernels waste nothing; mixers may end in dense attention."""
    form = row.part
    if form is None:
        return "sdpa" in row.kernels
    return form.fused and form.score.even and form.scope is None


def _fastest(
    dropout: bool, odd: bool, device: str, dtype: torch.dtype, compiled: bool, keys: int | None
) -> str:
    # PyTorch's path for a bias that learns, or for values of another width than keys (both are `odd`), is not fused on
    # CPU and holds S^2; row blocks take 0.5 to 1.1 of its time there with a bias (32 heads x 512 x 64, causal or not,
    # documents or not) and hold S.
    if dropout or (odd and device == "cpu"):
        return "blocks"
    # The flash kernel's bf16 backward on CPU is slow. Row blocks take 0.25 to 0.5 of its time for a block of keys
    # (192 heads x 65 x 64, 128 heads x 128 x 64), as much for two; once fused by the compiler 0.75 of it for longer
    # rows too (64 heads x 512 x 64). In fp32 SDPA wins.
    if device == "cpu" and dtype == torch.bfloat16 and (compiled or (keys or SHORT + 1) <= SHORT):
        return "blocks"
    return "sdpa"
