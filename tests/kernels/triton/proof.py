"""What a proof of a kernel is made of. Sizes are those of `kernels.triton.workloads`; modules of `proofs` have:

CASES      name -> function that computes on a device; what it found beside what it must be; the first is always run
OFTEN      names of cases that `make matrix` runs, cheap ones that tell much; may be left out
COSTS      name of a kernel -> function of a launch that gives its `Cost`, by the kernel's own loops
COMPILED   more names and calls, which are compiled but not in the tables; may be left out
NARROW     name of a kernel -> why none of its loads has 16 bytes; may be left out
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.tests.kernels.triton.launches import Launch

OPS = tuple(sorted(path.stem for path in (Path(__file__).parent / "proofs").glob("*.py")))
"""Modules of `proofs`."""


class Result(NamedTuple):
    """An output or a gradient.

    Attributes:
        found: of the kernel.
        wanted: in fp64, by the reference.
        tolerance: how far apart they may be, absolute.
    """

    found: Tensor
    wanted: Tensor
    tolerance: float


Case = Callable[[torch.device], Mapping[str, Result]]


class Cost(NamedTuple):
    """Of a launch: bytes that its loops read and write, bytes of its operands once, FLOPs of products and others."""

    read: float
    written: float
    least: float
    products: float = 0.0
    others: float = 0.0


def once(launch: Launch) -> int:
    """Bytes of all tensors that a launch is given: what it must move if it reads or writes each number once."""
    return sum(x.numel() * x.element_size() for x in launch.tensors)


def narrowest(launch: Launch) -> int:
    """Bytes of a number of the narrowest dtype that a launch is given: that of its products."""
    return min(x.element_size() for x in launch.tensors if x.is_floating_point())


def seed() -> int:
    """Of drawn operands: another one every time, unless $HEADWAY_TEST_SEED says which."""
    chosen = os.environ.get("HEADWAY_TEST_SEED")
    return int(chosen) if chosen else int.from_bytes(os.urandom(4), "little")


def drawn(
    draw: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32, device: Any = "cpu"
) -> Tensor:
    """Standard normal numbers that a dtype has, as leaves that want gradients."""
    return torch.randn(shape, generator=draw).to(dtype).to(device).requires_grad_()
