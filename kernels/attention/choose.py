"""The choice of a kernel: an explicit request is honoured or refused, `auto` takes the fastest that is right."""

from __future__ import annotations

from typing import NamedTuple

import torch

from headway.kernels import fused
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


class _Call(NamedTuple):
    """What a kernel would compute, and where; fields as arguments of `choose`."""

    dropout: bool
    bias: bool
    device: str
    dtype: torch.dtype
    compiled: bool
    keys: int | None
    described: bool
    causal: bool
    width: int | None

    @property
    def learned(self) -> bool:
        """Whether there is a bias that only a tensor holds."""
        return self.bias and not self.described


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
    causal: bool = True,
    width: int | None = None,
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
        causal: whether no query sees a key after it.
        width: head dimension of keys or values, the larger one; any, if not given.

    Raises:
        KernelUnavailable: the request is unknown or cannot do what is asked.
    """
    row = by_name(mechanism) if isinstance(mechanism, str) else mechanism
    call = _Call(dropout, bias, device, dtype, compiled, keys, described, causal, width)
    if request == "auto":
        return row.kernels[_best(row, call)]
    if request not in row.kernels:
        rule = f"{row.name} attention has the kernels {', '.join(row.kernels)}"
        raise KernelUnavailable(request, rule, "auto")
    _check(row.kernels[request], row, call)
    return row.kernels[request]


def _check(kernel: Kernel, row: Mechanism, call: _Call) -> None:
    """Refuse a request that cannot be met."""
    interpreted = kernel.name == "triton" and call.device == "cpu" and fused.interprets()
    if call.device not in (*kernel.devices, ANYWHERE) and not interpreted:
        rule = f"it runs on {' and '.join(kernel.devices)}, forward and backward, not on {call.device}"
        raise KernelUnavailable(kernel.name, rule, "auto")
    if reason := _missing(kernel.name, call.dtype, call.device):
        raise KernelUnavailable(kernel.name, reason, "auto")
    anywhere = [k for k in reversed(row.kernels.values()) if len(k.devices) > 1]
    if call.dropout and not kernel.dropout:
        rule = "its dropout of attention weights would depend on the layout, so it takes none"
        raise KernelUnavailable(kernel.name, rule, next(k.name for k in anywhere if k.dropout))
    if call.bias and not kernel.bias and (call.learned or not kernel.slopes):
        nearest = next(k.name for k in anywhere if k.bias and k.dropout >= call.dropout)
        raise KernelUnavailable(kernel.name, "it computes no bias of the scores", nearest)
    if kernel.causal and not call.causal:
        raise KernelUnavailable(kernel.name, "it computes causal attention alone", anywhere[0].name)
    if not _fits(kernel, call):
        rule = f"it takes heads up to {kernel.widest} wide, not {call.width}"
        raise KernelUnavailable(kernel.name, rule, anywhere[0].name)


def _missing(kernel: str, dtype: torch.dtype, device: str) -> str | None:
    """Why a kernel that is not PyTorch's own cannot be had here, or None."""
    if kernel == "cpp":
        return cpp.unavailable(dtype)
    if kernel == "triton":
        if dtype == torch.float64:
            return "it takes fp32, bf16 and fp16"
        return None if device == ANYWHERE else fused.unavailable(device)
    return flash.unavailable(kernel) if kernel in flash.PACKAGES else None


def _best(row: Mechanism, call: _Call) -> str:
    """The fastest kernel that is right."""
    plain, wide = _dense(row), call.dtype == torch.float64
    if call.device == "cuda" and not wide:  # generated code is tested in what models are trained in
        # What FlexAttention takes it skips empty blocks of; dense attention is PyTorch's own kernel's.
        flexible = not call.dropout and not call.learned and (call.described or not plain)
        if "flex" in row.kernels and flexible:
            return "flex"
        if (not plain or call.dropout or call.learned) and _triton_can(row, call):
            return "triton"
    if (
        call.device == "cpu"
        and "cpp" in row.kernels
        and not wide
        and _missing("cpp", call.dtype, "cpu") is None
    ):
        return "cpp"
    if plain:
        return _fastest(row.narrow, call)
    return [name for name in row.kernels_on("cpu") if name != "cpp"][-1]


def _triton_can(row: Mechanism, call: _Call) -> bool:
    """Whether Triton's kernel is there, wanted, and takes this."""
    kernel = row.kernels.get("triton")
    if kernel is None or fused.preferred() == "torch" or fused.unavailable(call.device):
        return False
    able = kernel.dropout >= call.dropout and (call.causal or not kernel.causal) and _fits(kernel, call)
    return able and (kernel.bias or not call.bias or (kernel.slopes and call.described))


def _fits(kernel: Kernel, call: _Call) -> bool:
    return kernel.widest is None or call.width is None or call.width <= kernel.widest


def _dense(row: Mechanism) -> bool:
    """Whether every pair is seen, so that PyTorch's kernels waste nothing; mixers may end in dense attention."""
    form = row.part
    if form is None:
        return "sdpa" in row.kernels
    return form.fused and form.score.even and form.scope is None


def _fastest(narrow: bool, call: _Call) -> str:
    # PyTorch's path for a bias that learns, or for values of another width than keys (both are `odd`), is not fused on
    # CPU and holds S^2; row blocks take 0.5 to 1.1 of its time there with a bias (32 heads x 512 x 64, causal or not,
    # documents or not) and hold S.
    odd = call.bias or narrow
    if call.dropout or (odd and call.device == "cpu"):
        return "blocks"
    # The flash kernel's bf16 backward on CPU is slow. Row blocks take 0.25 to 0.5 of its time for a block of keys
    # (192 heads x 65 x 64, 128 heads x 128 x 64), as much for two; once fused by the compiler 0.75 of it for longer
    # rows too (64 heads x 512 x 64). In fp32 SDPA wins.
    short = call.compiled or (call.keys or SHORT + 1) <= SHORT
    if call.device == "cpu" and call.dtype == torch.bfloat16 and short:
        return "blocks"
    return "sdpa"
