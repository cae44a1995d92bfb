"""What kernels are measured on: for an op, calls forward and backward at sizes of real models.

Modules are called as the ops, and have SIZES: names -> a call that makes its operands on a device and launches all
kernels of the op. On `meta` operands have no data, and launches can be recorded alone. Names give rows and widths.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

Call = Callable[[torch.device], None]

OPS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))
"""Modules of this folder."""


def sizes_of(op: str) -> Mapping[str, Call]:
    """An op's SIZES. Its kernels are imported, hence Triton."""
    found: Mapping[str, Call] = importlib.import_module(f"{__name__}.{op}").SIZES
    return found


def normal(device: torch.device, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Standard normal numbers, which want gradients."""
    return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)


def below(device: torch.device, limit: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Whole numbers from 0, equally likely."""
    return torch.randint(limit, shape, dtype=dtype, device=device)


def packed(device: torch.device, batch: int, length: int) -> Tensor:
    """Ids of four documents a row, int32 [B, S]."""
    ids = torch.arange(length, device=device) * 4 // length
    return ids.to(torch.int32).expand(batch, length)
