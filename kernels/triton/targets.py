"""GPUs that kernels are compiled for: what they have, from their makers' data sheets.

Rates are dense, without sparsity; of AMD's matrix cores for fp32, of NVIDIA's vector units (products of fp32 use no tf32
here).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Target(NamedTuple):
    """A kind of GPU.

    Attributes:
        name: as Triton and its assembler call it.
        product: the GPU whose figures these are.
        backend, architecture, lanes: Triton's `GPUTarget`.
        narrow, wide: products of bf16 or fp16, and of fp32, FLOP/s.
        vector: other arithmetic in fp32, FLOP/s.
        bandwidth: of memory, bytes/s.
        shared: bytes that a program may have in shared memory.
        instruction: what its tensor cores are asked with, as a regular expression over the assembly.
    """

    name: str
    product: str
    backend: str
    architecture: int | str
    lanes: int
    narrow: float
    wide: float
    vector: float
    bandwidth: float
    shared: int
    instruction: str

    def rate(self, itemsize: int) -> float:
        """Products of numbers of so many bytes, FLOP/s."""
        return self.narrow if itemsize == 2 else self.wide


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100 SXM 80 GB", "cuda", 80, 32, 312e12, 19.5e12, 19.5e12, 2.039e12, 163 * 1024, r"\bmma\.sync"),
        Target("sm_90a", "H100 SXM", "cuda", 90, 32, 989.4e12, 66.9e12, 66.9e12, 3.35e12, 227 * 1024, r"\bwgmma\.mma_async"),
        Target("sm_100a", "B200", "cuda", 100, 32, 2250e12, 75e12, 75e12, 8e12, 227 * 1024, r"\btcgen05\.mma"),
        Target("gfx942", "MI300X", "hip", "gfx942", 64, 1307.4e12, 163.4e12, 163.4e12, 5.3e12, 64 * 1024, r"\bv_mfma_"),
    )
}  # fmt: skip

DEFAULT = "sm_90a"
"""Whose tiles an unknown GPU is given, and the interpreter."""


def target_of(device: torch.device) -> str:
    """The target whose tiles suit a device: its own, or the newest one before it."""
    if device.type != "cuda":
        return DEFAULT
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90a"}.get(major, "sm_100a" if major >= 10 else "sm_80")
