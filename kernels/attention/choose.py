"""The choice of a kernel: an explicit request is honoured or refused, `auto` takes the fastest that is right."""

from __future__ import annotations

import torch

from headway.kernels.attention import cpp, flash
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
    if request == "auto":
        name = _best(row, dropout, bias, device, dtype, compiled, keys, described)
        return row.kernels[name]
    if request not in row.kernels:
        rule = f"{row.name} attention has the kernels {', '.join(row.kernels)}"
        raise KernelUnavailable(request, rule, "auto")
    _check(row.kernels[request], row, dropout, bias and not described, bias, device, dtype)
    return row.kernels[request]


def _check(
    kernel: Kernel, row: Mechanism, dropout: bool, learned: bool, bias: bool, device: str, dtype: torch.dtype
) -> None:
    """Refuse a request that cannot be met."""
    if device not in (*kernel.devices, ANYWHERE):
        rule = f"it runs on {' and '.join(kernel.devices)}, forward and backward, not on {device}"
        raise KernelUnavailable(kernel.name, rule, "auto")
    if reason := _missing(kernel.name, dtype):
        raise KernelUnavailable(kernel.name, reason, "auto")
    anywhere = [k for k in reversed(row.kernels.values()) if len(k.devices) > 1]
    if dropout and not kernel.dropout:
        rule = "its dropout of attention weights would depend on the layout, so it takes none"
        raise KernelUnavailable(kernel.name, rule, next(k.name for k in anywhere if k.dropout))
    if bias and not kernel.bias and (learned or not kernel.slopes):
        nearest = next(k.name for k in anywhere if k.bias and k.dropout >= dropout)
        raise KernelUnavailable(kernel.name, "it computes no bias of the scores", nearest)


def _missing(kernel: str, dtype: torch.dtype) -> str | None:
    """Why a kernel that is not PyTorch's own cannot be had here, or None."""
    if kernel == "cpp":
        return cpp.unavailable(dtype)
    return flash.unavailable(kernel) if kernel in flash.PACKAGES else None


def _best(
    row: Mechanism,
    dropout: bool,
    bias: bool,
    device: str,
    dtype: torch.dtype,
    compiled: bool,
    keys: int | None,
    described: bool,
) -> str:
    """The fastest kernel that is right."""
    plain, wide = (
        _dense(row),
        dtype == torch.float64,
    )  # generated code is tested in what models are trained in
    flexible = not dropout and (described or not bias) and (described or not plain)
    if device == "cuda" and "flex" in row.kernels and flexible and not wide:
        return "flex"
    if device == "cpu" and "cpp" in row.kernels and not wide and _missing("cpp", dtype) is None:
        return "cpp"
    if plain:
        return _fastest(dropout, bias or row.narrow, device, dtype, compiled, keys)
    return [name for name in row.kernels_on("cpu") if name != "cpp"][-1]


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
