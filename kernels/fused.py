"""Whether Triton's fused kernels compute what a model does, or PyTorch's operators.

`auto` takes Triton's on GPUs, but for fp64, for tensors of subclasses (those that are spread over ranks), and inside of
compiled blocks, which PyTorch's compiler fuses by itself. `torch` takes them nowhere. `triton` is for who wants to be
told where they cannot run; with TRITON_INTERPRET=1 it takes them on CPUs too, slowly, by Triton's interpreter.

What a choice is for is a process, as PyTorch's own switches of kernels are (`torch.backends`).
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Choice = Literal["auto", "torch", "triton"]

_CHOICE: list[Choice] = ["auto"]


def prefer(choice: Choice) -> None:
    """From now on, in this process."""
    _CHOICE[0] = choice


def preferred() -> Choice:
    """What was chosen last."""
    return _CHOICE[0]


def unavailable(device: str) -> str | None:
    """Why Triton's kernels cannot run on a kind of device, or None if they can.

    Of a GPU that this build of PyTorch cannot use, but a plan may be for, nothing is known that forbids it.
    """
    if device == "cuda":
        foreign = torch.version.cuda is None and torch.version.hip is None
        return (
            None
            if foreign or _installed()
            else "it needs Triton, which is not installed (pip install triton)"
        )
    if device == "cpu" and interprets():
        return None if _installed() else "TRITON_INTERPRET=1 needs Triton, which is not installed"
    return f"it runs on cuda, not on {device}"


def interprets() -> bool:
    """Whether Triton was told to compute on CPUs, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def fused(x: Tensor, *others: Tensor | None) -> bool:
    """Whether Triton's kernels compute an operation of these tensors."""
    device, choice = x.device.type, _CHOICE[0]
    if torch.compiler.is_compiling() or choice == "torch" or (device != "cuda" and choice == "auto"):
        return False
    plain = all(t is None or (type(t) in _PLAIN and t.dtype != torch.float64) for t in (x, *others))
    return plain and unavailable(device) is None


_PLAIN = (Tensor, torch.nn.Parameter)


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None
