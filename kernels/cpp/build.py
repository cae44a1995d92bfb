"""C++ kernels for CPUs: compiled where they run, at first use, for the processor that is there.

The library lies where PyTorch keeps compiled extensions ($TORCH_EXTENSIONS_DIR, else torch_extensions in the user's
cache), under a name that says what it was made of and for: one that lies there fits. Of the processes that want it at
once one compiles it, and the others wait; a lock of the system's is gone with the process that held it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import warnings
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("attention.cpp")
HEADERS = sorted(SOURCE.parent.glob("*.h"))
SECONDS = 600
"""That a compiler may take: on a busy machine many times the 20 of an idle one."""


class CannotBuild(RuntimeError):
    """The kernels cannot be compiled or loaded here; the message says why."""


@cache
def load() -> None:
    """Load the operators `torch.ops.headway_cpp`, compiled before if they are not.

    What a process has loaded it keeps, whatever has changed since: PyTorch ends one that registers operators twice.

    Raises:
        CannotBuild: no Linux, no compiler, or it failed.
    """
    if hasattr(torch.ops.headway_cpp, "attention"):
        return
    if platform.system() != "Linux":
        raise CannotBuild(f"C++ kernels are built on Linux, and this is {platform.system()}")
    command = _command()
    try:
        path = _folder() / f"attention-{_digest(command)}.so"
        if not path.exists():
            _compile(command, path)
    except OSError as e:
        raise CannotBuild(f"{e}") from e
    try:
        torch.ops.load_library(path)
    except OSError as e:
        raise CannotBuild(f"{path} cannot be loaded (remove it to compile anew): {e.__cause__ or e}") from e


@cache
def missing() -> str | None:
    """Why there are no C++ kernels here, or None if there are. What was tried and failed is told once."""
    try:
        load()
    except CannotBuild as e:
        warnings.warn(f"C++ kernels for CPUs are not used: {e}", stacklevel=2)
        return str(e)
    return None


def _command() -> list[str]:
    """The compiler and what it is told, but for the file it writes."""
    root = Path(torch.__file__).parent
    return [
        *os.environ.get("CXX", "g++").split(),
        *("-std=c++20", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-DNDEBUG"),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-I{root / 'include'}",
        str(SOURCE),
        *(f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"),
    ]


def _digest(command: list[str]) -> str:
    """Of the sources, the compiler's command, PyTorch and the processor: a home may be shared by different machines."""
    processor = next(
        (
            line
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith(("flags", "Features"))
        ),
        platform.processor(),
    )
    sources = [path.read_text() for path in (SOURCE, *HEADERS)]
    parts = [*sources, *command, torch.__version__, platform.machine(), processor]
    return hashlib.blake2b("\0".join(parts).encode(), digest_size=10).hexdigest()


def _folder() -> Path:
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_extensions"
    return (Path(chosen) if chosen else cached) / "headway"


def _compile(command: list[str], path: Path) -> None:
    """Write the library under a name of its own, then give it its name."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            part = path.with_suffix(f".{os.getpid()}.part")
            done = subprocess.run(
                [*command, "-o", str(part)], capture_output=True, text=True, timeout=SECONDS
            )
            if done.returncode != 0:
                raise CannotBuild(f"{command[0]} failed: {_first_error(done.stderr)}")
            os.replace(part, path)
    except (OSError, subprocess.TimeoutExpired) as e:
        raise CannotBuild(f"{command[0]}: {e}") from e


def _first_error(output: str) -> str:
    lines = output.strip().splitlines() or ["it said nothing"]
    return next((line for line in lines if "error" in line), lines[-1])
