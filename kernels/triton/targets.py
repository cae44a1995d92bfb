"""GPUs that kernels are compiled for: what they have, from their makers' data sheets.

Rates are dense, without sparsity; those of fp32 are of AMD's matrix cores and of NVIDIA's vector units, as products of
fp32 use no tf32 here.
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


_KIB = 1024
_TERA = 1e12

TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "A100 SXM 80 GB", "cuda", 80, 32, 312 * _TERA, 19.5 * _TERA, 19.5 * _TERA,
               2.039 * _TERA, 163 * _KIB, r"\bmma\.sync"),
        Target("sm_90a", "H100 SXM", "cuda", 90, 32, 989.4 * _TERA, 66.9 * _TERA, 66.9 * _TERA,
               3.35 * _TERA, 227 * _KIB, r"\bwgmma\.mma_async"),
        Target("sm_100a", "B200", "cuda", 100, 32, 2250 * _TERA, 75 * _TERA, 75 * _TERA,
               8 * _TERA, 227 * _KIB, r"\btcgen05\.mma"),
        Target("gfx942", "MI300X", "hip", "gfx942", 64, 1307.4 * _TERA, 163.4 * _TERA, 163.4 * _TERA,
               5.3 * _TERA, 64 * _KIB, r"\bv_mfma_"),
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
