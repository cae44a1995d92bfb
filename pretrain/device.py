"""Which device and backend a run uses, how fast matrix products can be there, and which precision pays.

The denominator of MFU is honest: the data sheet's *dense* peak of a known GPU (never the number "with
sparsity", which is twice as high), and the best measured matrix product everywhere else.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import re
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from headway.pretrain.errors import JobError
from headway.pretrain.files import cache_folder, publish

PRECISIONS = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
    "fp8": torch.bfloat16,
}
"""Dtype of the matrix products of each precision; of fp8 that of most of them: peaks are those of bf16 then."""

_NAMES = {dtype: name for name, dtype in PRECISIONS.items() if name != "fp8"}

# Dense peaks in TFLOP/s, per device as torch counts it, from NVIDIA's data sheets and, for workstation and
# GeForce cards, from the Ampere GA102, Ada and RTX Blackwell whitepapers (tensor cores with fp32
# accumulation, as PyTorch uses them). Where a sheet gives only "with sparsity" (H100, H200, B200, L4), it is
# half of that. Names match in full: a MIG slice, a laptop or a regional variant is another machine, and is
# measured.
_PEAKS: list[tuple[str, dict[str, float]]] = [
    (r"Tesla V100-SXM2-\d+GB", {"fp32": 15.7, "fp16": 125}),
    (r"Tesla V100-PCIE-\d+GB", {"fp32": 14, "fp16": 112}),
    (r"Tesla V100S-PCIE-32GB", {"fp32": 16.4, "fp16": 130}),
    (r"Tesla T4", {"fp32": 8.1, "fp16": 65}),
    (r"A100-(SXM4|PCIE)-\d+GB|A100 80GB PCIe", {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312}),
    (r"A10", {"fp32": 31.2, "tf32": 62.5, "bf16": 125, "fp16": 125}),
    (r"A30", {"fp32": 10.3, "tf32": 82, "bf16": 165, "fp16": 165}),
    (r"A40", {"fp32": 37.4, "tf32": 74.8, "bf16": 149.7, "fp16": 149.7}),
    (r"RTX A6000", {"fp32": 38.7, "tf32": 77.4, "bf16": 154.8, "fp16": 154.8}),
    (r"GeForce RTX 3090", {"fp32": 35.6, "tf32": 35.6, "bf16": 71, "fp16": 71}),
    (r"L4", {"fp32": 30.3, "tf32": 60, "bf16": 121, "fp16": 121}),
    (r"L40", {"fp32": 90.5, "tf32": 90.5, "bf16": 181, "fp16": 181}),
    (r"L40S", {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362}),
    (r"RTX 6000 Ada Generation", {"fp32": 91.1, "tf32": 182.1, "bf16": 364.2, "fp16": 364.2}),
    (r"GeForce RTX 4090", {"fp32": 82.6, "tf32": 82.6, "bf16": 165.2, "fp16": 165.2}),
    (r"H100 80GB HBM3", {"fp32": 67, "tf32": 494.5, "bf16": 989, "fp16": 989}),
    (r"H100 PCIe", {"fp32": 51, "tf32": 378, "bf16": 756, "fp16": 756}),
    (r"(H100|H200) NVL", {"fp32": 60, "tf32": 417.5, "bf16": 835.5, "fp16": 835.5}),
    (r"H200|GH200 \d+GB", {"fp32": 67, "tf32": 494.5, "bf16": 989, "fp16": 989}),
    (r"B200", {"fp32": 75, "tf32": 1100, "bf16": 2250, "fp16": 2250}),
    (r"GB200", {"fp32": 80, "tf32": 1250, "bf16": 2500, "fp16": 2500}),
    (r"GeForce RTX 5090", {"fp32": 104.8, "tf32": 104.8, "bf16": 209.5, "fp16": 209.5}),
]


VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Variables by which a launcher shows a process some of a host's GPUs."""


def choose_device(requested: str = "auto", local_rank: int = 0) -> torch.device:
    """The device of this rank: `auto` is a GPU of its own where torch sees one, else the CPU.

    A launcher may show each rank only its own GPU (`srun --gpus-per-task=1`): that is then the device, whatever
    the rank's number. Ranks that are shown the same one are refused when they meet.

    Raises JobError if CUDA was asked for and is missing, or if the host has fewer GPUs than ranks.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if requested == "cuda":
            rule = f"torch {torch.__version__} sees no CUDA device on this host"
            raise JobError("parallel.device", requested, rule, "cpu")
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and any(name in os.environ for name in VISIBLE):
        return torch.device("cuda", 0)
    if local_rank >= count:
        rule = f"every process of a host needs a GPU of its own: process {local_rank} finds {count}"
        raise JobError("parallel.device", requested, rule, f"cpu, or at most {count} processes on this host")
    return torch.device("cuda", local_rank)


def choose_backend(device: torch.device, requested: str = "auto") -> str:
    """Backend of collectives: `auto` is nccl between GPUs and gloo between CPUs; JobError if impossible."""
    nccl = (
        device.type == "cuda" and torch.distributed.is_available() and torch.distributed.is_nccl_available()
    )
    if requested == "auto":
        return "nccl" if nccl else "gloo"
    if requested == "nccl" and not nccl:
        why = "this torch was built without NCCL" if device.type == "cuda" else f"the device is {device.type}"
        raise JobError("parallel.backend", requested, f"NCCL connects CUDA devices, and {why}", "gloo")
    return requested


@functools.cache
def device_name(device: torch.device) -> str:
    """Name of the chip, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def peak_rate(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """FLOP/s that one device could reach at most, and where the number comes from.

    fp32 on a GPU that may use TF32 is held against the TF32 peak.
    """
    kind, name = _kind(device, dtype), device_name(device)
    if device.type == "cuda":
        bare = name.removeprefix("NVIDIA ")
        for pattern, peaks in _PEAKS:
            if re.fullmatch(pattern, bare) and kind in peaks:
                return peaks[kind] * 1e12, f"dense {kind} peak of the data sheet of {name}"
    source = f"measured: best square {kind} product on {name}"
    if device.type == "cpu":
        source += f", {_threads(device)}"
    return matmul_rate(device, dtype), source


def matmul_rate(device: torch.device, dtype: torch.dtype, *, budget: float = 2.0) -> float:
    """FLOP/s of the best square matrix product, with torch's present number of threads.

    Sizes double while they are expected to fit into `budget` seconds together. Measured once: the result is
    kept in the user's cache, by device, dtype, threads and version of torch, unless the host was busy.
    """
    key = _cache_key(f"square {_kind(device, dtype)}", device)
    cached = _cache_get(key)
    if isinstance(cached, float) and cached > 0:
        return cached
    best, spent, n = 0.0, 0.0, 512
    while n <= (4096 if device.type == "cpu" else 16384):
        expected = 2 * 2 * n**3 / best if best else 0.0
        if spent + expected > budget:
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = functools.partial(torch.mm, a, b, out=torch.empty_like(a))
        seconds, taken = _fastest(product, device, budget / 8)
        best, spent, n = max(best, 2 * n**3 / seconds), spent + taken, 2 * n
    _cache_put(key, best)
    return best


def choose_precision(
    requested: str, device: torch.device, *, hidden: int, rows: int, ffn: int | None = None
) -> tuple[str, str]:
    """Precision of matrix products and the reason, for people; JobError for bf16 on a GPU without it.

    `auto` on a GPU is bf16 where its hardware has it, else fp16. On a CPU small bf16 products can take a path
    that is ten times slower than fp32, so forward and backward of one linear layer of this job's shape are
    timed in both; fp32 stays unless bf16 is at least a tenth faster. The answer is cached unless the host is
    busy; keep it with the run, so that it resumes as it began. Call it on one rank and tell the others: ranks
    that measure apart may disagree.

    Args:
        hidden, ffn: widths of the layer; ffn is 4 x hidden if not given.
        rows: tokens that go through the layer at once (micro-batch x sequence length).
    """
    if requested == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        rule = f"{device_name(device)} has no bf16 units and would emulate them"
        raise JobError("precision", requested, rule, "fp16")
    if requested != "auto":
        return requested, "set in the job"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(False):
            return "bf16", f"{device_name(device)} has bf16 units"
        return "fp16", f"{device_name(device)} has no bf16 units"
    ffn = ffn or 4 * hidden
    key = _cache_key(f"linear {rows} x {hidden} x {ffn}", device)
    rates = _cache_get(key)
    if not (isinstance(rates, dict) and {"fp32", "bf16", "rows"} <= rates.keys()):
        rates = _linear_rates(rows, hidden, ffn)
        _cache_put(key, rates)
    choice = "bf16" if rates["bf16"] > 1.1 * rates["fp32"] else "fp32"
    shape = f"{rates['rows']} x {hidden} x {ffn}, {_threads(device)}"
    speeds = f"fp32 {rates['fp32'] / 1e9:.3g}, bf16 {rates['bf16'] / 1e9:.3g} GFLOP/s"
    return choice, f"measured on this CPU at {shape}: {speeds}"


def _linear_rates(rows: int, hidden: int, ffn: int, budget: float = 0.8) -> dict[str, float]:
    """FLOP/s of forward and backward of a linear layer in fp32 and under bf16 autocast, casts included.

    Which path a product takes depends on its rows too, so they grow to the job's own, as far as two calls of
    each are expected to fit into `budget` seconds: a machine on which bf16 is a hundred times slower
    says so in under a second as well.
    """
    # Beyond these widths a product takes the same path, and the weights alone would take the time.
    hidden, ffn = min(hidden, 1024), min(ffn, 4096)
    weight = torch.randn(ffn, hidden, requires_grad=True)
    for dtype in (torch.float32, torch.bfloat16):  # pays for start-up, untimed
        _linear_step(torch.randn(64, hidden, requires_grad=True), weight, torch.randn(64, ffn, dtype=dtype))
    rates: dict[str, float] = {}
    spent, size = 0.0, min(rows, 64)
    while True:
        x, grad = torch.randn(size, hidden, requires_grad=True), torch.randn(size, ffn)
        seconds = 0.0
        for name in ("fp32", "bf16"):
            step = functools.partial(_linear_step, x, weight, grad.to(PRECISIONS[name]))
            fastest, taken = _fastest(step, x.device, budget / 20)
            seconds, spent = seconds + fastest, spent + taken
            rates[name] = 6 * size * hidden * ffn / fastest
        rates["rows"] = size
        # Small products leave the units idle, so time grows more slowly than rows: a step of 4 is modest.
        grown = min(rows, 4 * size)
        if size == rows or spent + seconds * (grown / size) > budget:
            return rates
        size = grown


def _linear_step(x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=grad.dtype == torch.bfloat16):
        out = F.linear(x, weight)
    torch.autograd.grad(out, [t for t in (x, weight) if t.requires_grad], grad)


@functools.cache
def compiler_available() -> bool:
    """Whether torch.compile can build CPU kernels here: a C++ compiler with OpenMP, and Python's headers.

    Asks the compiler that Inductor would take ($CXX, else g++ or clang++) instead of looking for it: with
    a compiler but without Python's development headers, compilation fails too.
    """
    compiler = os.environ.get("CXX") or ("clang++" if platform.system() == "Darwin" else "g++")
    command = [*compiler.split(), "-x", "c++", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-"]
    if platform.system() == "Linux":
        command.insert(1, "-fopenmp")
    program = "#include <Python.h>\n#include <vector>\n"
    try:
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _kind(device: torch.device, dtype: torch.dtype) -> str:
    if dtype == torch.float32 and device.type == "cuda" and _tf32_allowed():
        return "tf32"
    return _NAMES.get(dtype, str(dtype).removeprefix("torch."))


def _tf32_allowed() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the newer setting was used in this process, and torch refuses to translate
        return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _fastest(function: Callable[[], object], device: torch.device, enough: float) -> tuple[float, float]:
    """Seconds of the fastest of up to 10 calls, made until they took `enough` together, and of all calls."""
    times = [_seconds(function, device)]
    while len(times) < 10 and sum(times) < enough:
        times.append(_seconds(function, device))
    return min(times), sum(times)


def _seconds(function: Callable[[], object], device: torch.device) -> float:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    wait()
    start = time.perf_counter()
    function()
    wait()
    return time.perf_counter() - start


def _threads(device: torch.device) -> str:
    count = torch.get_num_threads()
    return "" if device.type != "cpu" else f"{count} thread{'s' if count > 1 else ''}"


def _cache_key(what: str, device: torch.device) -> str:
    return ", ".join(
        filter(None, [what, device_name(device), _threads(device), f"torch {torch.__version__}"])
    )


def _cache_get(key: str) -> object:
    try:
        return json.loads((cache_folder() / "rates.json").read_text()).get(key)
    except (OSError, ValueError, AttributeError):
        return None


def _cache_put(key: str, value: object) -> None:
    """Best effort: a cache that cannot be written costs the next run a second, nothing else.

    What was measured while other processes wanted the cores is used once and forgotten.
    """
    with contextlib.suppress(OSError, AttributeError):  # not on Windows
        if os.getloadavg()[0] > (os.cpu_count() or 1):
            return
    path = cache_folder() / "rates.json"
    try:
        rates = json.loads(path.read_text())
    except (OSError, ValueError):
        rates = {}
    with contextlib.suppress(OSError, TypeError):
        path.parent.mkdir(parents=True, exist_ok=True)
        publish(path, json.dumps({**rates, key: value}, indent=1, sort_keys=True))
