"""Launches of kernels, compiled for GPUs that need not be here."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headway.kernels.triton.launches import Launch, recorded
from headway.kernels.triton.targets import Target

__all__ = ["Launch", "Resources", "compiled", "recorded", "resources"]

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.bool: "i1",
}
COMPILER = ("num_warps", "num_stages", "maxnreg")


def compiled(launch: Launch, target: Target) -> Any:
    """A kernel as a launch compiles it on a GPU: what is 1 is a constant, what 16 divides is known to be so."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}

    def described(x: Any, path: tuple[int, ...]) -> Any:
        if isinstance(x, tuple):
            return type(x)(*(described(each, (*path, i)) for i, each in enumerate(x)))
        if x is None or (isinstance(x, int) and x == 1):
            constants[path] = x
            return "constexpr"
        if isinstance(x, torch.Tensor) or (isinstance(x, int) and x % 16 == 0):
            attributes[path] = [["tt.divisibility", 16]]
        if isinstance(x, torch.Tensor):
            return f"*{NAMES[x.dtype]}"
        if isinstance(x, float):
            return "fp32"
        return "i32" if -(2**31) <= x < 2**31 else "i64"

    names = launch.kernel.arg_names
    constexprs = {names[i] for i in launch.kernel.constexprs}
    signature: dict[str, Any] = {}
    for name, x in launch.arguments.items():
        if name in COMPILER:
            continue
        path = (names.index(name),)
        if name in constexprs:
            signature[name] = "constexpr"
            constants[path] = x
        else:
            signature[name] = described(x, path)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    how = {name: launch.options[name] for name in COMPILER if name in launch.options}
    return triton.compile(
        source, target=GPUTarget(target.backend, target.architecture, target.lanes), options=how
    )


class Resources(NamedTuple):
    """What a compiled kernel takes.

    Attributes:
        registers: of a thread.
        spilled: bytes that a thread stores for want of registers (on AMD: registers).
        shared: bytes of a program in shared memory.
        tensor: instructions of tensor cores.
        wide: loads of 16 bytes.
        loads: all loads from memory.
    """

    registers: int
    spilled: int
    shared: int
    tensor: int
    wide: int
    loads: int


_LOADS = {"cuda": r"\bld\.global|\bcp\.async\.c[ag]|\bcp\.async\.bulk", "hip": r"\b(global|buffer)_load_"}
_WIDE = {
    "cuda": r"\bld\.global[.\w:]*\.v4\.b32|\bld\.global[.\w:]*\.v2\.b64|\bcp\.async\.cg[^;]*, 0x10|\bcp\.async\.bulk",
    "hip": r"\b(global|buffer)_load_dwordx4",
}


def resources(code: Any, target: Target) -> Resources:
    """Of a compiled kernel, from its assembly and the assembler's report."""
    if target.backend == "hip":
        text = report = code.asm["amdgcn"]
        patterns = r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)"
    else:
        text = code.asm["ptx"]
        report, patterns = _assembled(text), (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    registers, spilled = (int(_found(pattern, report)) for pattern in patterns)
    counts = (
        len(re.findall(p, text)) for p in (target.instruction, _WIDE[target.backend], _LOADS[target.backend])
    )
    return Resources(registers, spilled, int(code.metadata.shared), *counts)


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match, f"the assembler says nothing of {pattern}: {text[:500]}"
    return match[1]


def _assembled(ptx: str) -> str:
    """What the assembler says of the code. The older of the two that Triton ships refuses that of sm_90a."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    architecture = _found(r"\.target (\w+)", ptx)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
