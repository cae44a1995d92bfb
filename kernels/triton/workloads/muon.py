"""Matrices x rows x columns; a step of Newton and Schulz."""

from __future__ import annotations

import torch

from headway.kernels.triton.muon import orthogonalise
from headway.kernels.triton.workloads import normal

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic (Jordan, 2024, Muon)."""


def _call(device: torch.device, *shape: int) -> None:
    orthogonalise(normal(device, *shape).detach(), COEFFICIENTS, 1)


SIZES = {
    "48 x 768 x 768": lambda device: _call(device, 48, 768, 768),
    "8 x 4,096 x 4,096": lambda device: _call(device, 8, 4096, 4096),
    "2 x 4,096 x 16,384": lambda device: _call(device, 2, 4096, 16384),
}
