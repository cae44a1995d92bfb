"""`metrics.jsonl`: one JSON object a step, each step once, whatever happened to the process that wrote it.

Keys: `step, loss, lr, grad_norm, tokens, tokens_per_second, step_seconds, mfu, memory_gib`, `joules` and `watts` where
energy is counted, then what the objective and evaluations add, and `tokens_seen`, the tokens of all steps so far. A
number that is not finite is written as `null`, the only spelling that every JSON reader takes; `read_metrics` gives it
back as NaN.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from headway.pretrain.energy.counter import Reading
from headway.pretrain.engine import StepResult
from headway.pretrain.errors import DataError


def step_values(
    step: int,
    result: StepResult,
    *,
    lr: float,
    seconds: float,
    flops: float,
    peak: float,
    memory_gib: float,
    energy: Reading | None = None,
) -> dict[str, Any]:
    """The line of one step.

    Args:
        seconds: wall time of the step.
        flops: floating-point operations of the step, forward and backward, over all ranks.
        peak: FLOP/s that all devices could reach together.
        energy: of all ranks, since the step before ended.
    """
    return {
        "step": step,
        "loss": result.loss,
        "lr": lr,
        "grad_norm": result.grad_norm,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / seconds,
        "step_seconds": seconds,
        "mfu": flops / seconds / peak,
        "memory_gib": memory_gib,
        **({"joules": energy.joules, "watts": energy.watts} if energy else {}),
        **({"skipped": True} if result.skipped else {}),
        **result.metrics,
    }


class MetricsFile:
    """Appends steps to `metrics.jsonl`; every line reaches the operating system before `write` returns.

    Opening it at `start_step` cuts off later steps (a killed run may have gone beyond its last checkpoint)
    and a torn last line, and publishes the rest under the same name: a process of an earlier incarnation that
    still lives writes into the unlinked file.

    A full disk raises OSError and leaves no torn line; the lines wait in memory and go out with the next one.
    """

    def __init__(self, path: Path, start_step: int = 0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._end, self._row = cut_metrics(path, start_step)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        self._pending = b""
        self._line = encode(self._row) if self._row else b""

    @property
    def last(self) -> Mapping[str, Any]:
        """The last line, empty if there is none."""
        return self._row

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one step."""
        self._row, self._line = dict(row), encode(row)
        self._pending += self._line
        self._flush()

    def amend(self, values: Mapping[str, Any]) -> None:
        """Add values to the line of the last step: an evaluation comes after its step was written.

        Before the first step there is no line, and nothing is written.
        """
        if not self._row:
            return
        if self._pending.endswith(self._line):
            self._pending = self._pending[: len(self._pending) - len(self._line)]
        else:
            self._end -= len(self._line)
        self.write({**self._row, **values})

    def _flush(self) -> None:
        written = 0
        try:
            written = os.pwrite(self._file, self._pending, self._end)
            if written < len(self._pending):
                raise OSError("disk full: metrics.jsonl could not be extended")
            self._end, self._pending = self._end + written, b""
        finally:
            # Nothing of a torn line, and nothing of a longer line that this one replaced, may stay behind.
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)

    def close(self) -> None:
        os.close(self._file)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All steps in order; `null` comes back as NaN, and a torn last line is left out.

    Args:
        path: the file or the run folder that holds it; a missing file is an empty list.
    Raises:
        DataError: a line in the middle that is no JSON object with a step.
    """
    path = path / "metrics.jsonl" if path.is_dir() else path
    rows = []
    for row in _rows(path):
        rows.append({k: math.nan if v is None else v for k, v in row.items()})
    return rows


def cut_metrics(path: Path, last_step: int) -> tuple[int, dict[str, Any]]:
    """Keep the steps up to `last_step`, atomically; returns the bytes of what is left, and its last row."""
    part, size, last = path.with_name(f"{path.name}.{os.getpid()}.part"), 0, dict[str, Any]()
    with open(part, "wb") as file:
        for row in _rows(path):
            if last.get("step", 0) < row["step"] <= last_step:
                size, last = size + file.write(encode(row)), row
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return size, last


def encode(row: Mapping[str, Any]) -> bytes:
    """One line of JSON; tensors and NumPy numbers become plain ones, numbers that are not finite `null`."""
    return (json.dumps({k: plain(v) for k, v in row.items()}, allow_nan=False) + "\n").encode()


def plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "item"):  # a tensor or a NumPy number
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | bool | None) else str(value)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory that this process has held: of the GPU's allocator, or resident on the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not on Windows
    import sys

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kibibytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """Lines as they are; the last one only if it is whole."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                if not line.endswith(b"\n") or not isinstance(row["step"], int):
                    raise ValueError
            except (ValueError, KeyError, TypeError):
                if not file.read(1):
                    return
                rule = "is no JSON object with a step; delete the line to go on without that step"
                raise DataError(f"{path}, line {number}: {rule}") from None
            yield row
