"""A program of the tests: compiles the kernels that a call launches, for GPUs that need not be here; JSON of what each
takes: registers, bytes spilled, bytes of shared memory.

Arguments: plain or everything, head dimension, targets: sm_80, sm_90 (compiled as sm_90a), gfx942. A process of its own
because Triton, once found, is used by PyTorch too.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.kernels.attention.slopes import Slopes
from headway.kernels.maps.operands import Scores, Seen
from headway.tests.kernels.triton.cases import Case, compute
from headway.tests.kernels.triton.finding import find_triton

KERNELS = ("divergence", "log_sums", "terms", "query_gradient", "key_gradient", "bias_gradient")
NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Recorder:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple, dict]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: Any):
        return lambda *given, **options: self.launches.append((self.kernel, given, options))


def plain(dim: int) -> Case:
    """Causal, with documents, and a learned bias."""
    mask = Mask(True, torch.zeros(2, 256, dtype=torch.int64))
    models = [Scores(*torch.zeros(2, 2, 4, 256, dim, dtype=torch.bfloat16), 0.1) for _ in range(2)]
    return Case(models[0], models[1]._replace(bias=torch.zeros(4, 256, 256)), Seen(mask))


def everything(dim: int) -> Case:
    """Every condition of a mask, both kinds of biases, averaged heads, and fewer heads of keys."""
    q_t, q, k = (torch.zeros(2, heads, 250, dim, dtype=torch.bfloat16) for heads in (8, 4, 2))
    documents = torch.zeros(2, 250, dtype=torch.int64)
    mask = Mask(True, documents, documents, torch.zeros(2, dtype=torch.int64), scope=Window(100))
    slopes = Slopes(torch.zeros(8), torch.arange(250), torch.arange(250))
    pairs = torch.ones(1, 1, 1, 250, dtype=torch.bool).expand(1, 1, 250, 250)
    bias = torch.zeros(4, 250, 250)
    return Case(Scores(q_t, k, 0.1, slopes), Scores(q, k, 0.1, bias), Seen(mask, pairs))


def launches(case: Case, loss: str) -> list[tuple[Any, tuple, dict]]:
    """What a loss and its gradients launch."""
    from headway.kernels.triton import map_distillation, map_kernels

    found: list[tuple[Any, tuple, dict]] = []
    recorders = {
        f"{name}_kernel": Recorder(getattr(map_kernels, f"{name}_kernel"), found) for name in KERNELS
    }
    with mock.patch.multiple(map_kernels, **recorders):
        compute(map_distillation.sums, case, loss)
    return found


def compiled(kernel: Any, given: tuple, options: dict[str, Any], target: Any) -> Any:
    """A kernel as a launch with these arguments compiles it."""
    import triton
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
        return (
            f"*{NAMES[x.dtype]}" if isinstance(x, torch.Tensor) else "fp32" if isinstance(x, float) else "i32"
        )

    signature = {
        name: described(x, (i,)) for i, (name, x) in enumerate(zip(kernel.arg_names, given, strict=False))
    }
    how = {name: options[name] for name in ("num_warps", "num_stages")}
    for name in options.keys() - how.keys():
        signature[name] = "constexpr"
        constants[(kernel.arg_names.index(name),)] = options[name]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=how)


def taken(code: Any) -> dict[str, int]:
    """Registers of a thread, bytes (on AMD: registers) spilled, bytes of shared memory of a program."""
    if "amdgcn" in code.asm:
        text, patterns = code.asm["amdgcn"], (r"\.vgpr_count:\s*(\d+)", r"\.vgpr_spill_count:\s*(\d+)")
    else:
        text, patterns = _assembled(code.asm["ptx"]), (r"Used (\d+) registers", r"(\d+) bytes spill stores")
    registers, spilled = (int(re.search(pattern, text)[1]) for pattern in patterns)
    return {"registers": registers, "spilled": spilled, "shared": code.metadata.shared}


def _assembled(ptx: str) -> str:
    """What the assembler says of the code. The older of the two assemblers that Triton ships refuses sm_90's."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas-blackwell"
    architecture = re.search(r"\.target (\w+)", ptx)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(tool), "-v", f"-arch={architecture}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def main(make: Callable[[int], Case], dim: int, targets: list[str]) -> None:
    if not find_triton():
        print("null")
        return
    from triton.backends.compiler import GPUTarget

    known = {"sm_80": GPUTarget("cuda", 80, 32), "sm_90": GPUTarget("cuda", 90, 32)}
    known["gfx942"] = GPUTarget("hip", "gfx942", 64)
    case = make(dim)
    # js has the longest expressions, and launches all kernels but one, kl's: of single teacher heads.
    called = launches(case, "js") + launches(case, "kl")
    todo = {call[0].__name__: call for call in reversed(called)}
    found = {name: {t: taken(compiled(*call, known[t])) for t in targets} for name, call in todo.items()}
    print(json.dumps(found))


if __name__ == "__main__":
    main({"plain": plain, "everything": everything}[sys.argv[1]], int(sys.argv[2]), sys.argv[3:])
