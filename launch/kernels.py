"""`headway kernels`: measures the tiles of Triton kernels on this machine's GPU, and shows what was chosen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from headway.kernels.triton import tuning, workloads
from headway.kernels.triton.targets import TARGETS, target_of
from headway.launch.console import console
from headway.pretrain.errors import HeadwayError, JobError

if TYPE_CHECKING:
    from headway.kernels.triton.measuring import Measure, Measured


class MissingError(HeadwayError):
    """This machine lacks what a command is for; names it."""

    exit_code = 1


def tune(ops: Sequence[str], size: str | None, measure: Measure | None = None) -> None:
    """Measure all configurations of ops at their sizes (or at one of them), print them, and write down the fastest.

    Args:
        measure: seconds of a launch; by Triton's benchmark if left out.

    Raises:
        JobError: an op or a size that nobody knows.
        MissingError: there is no GPU, or no Triton.
    """
    for op in ops:
        if op not in workloads.OPS:
            near = difflib.get_close_matches(op, workloads.OPS, n=1, cutoff=0)
            raise JobError("OP", op, f"must be one of {', '.join(workloads.OPS)}", near[0])
    device = _gpu()
    from headway.kernels.triton.measuring import measure_all, seconds_of

    found: list[Measured] = []
    output = console()
    with output.status("") as status:
        for op, calls in _calls(ops or workloads.OPS, size).items():
            tell = lambda what, op=op: status.update(f"{op}: {what}")  # noqa: E731
            rows = measure_all(calls, device, measure=measure or seconds_of, say=tell)
            tuning.remember(device, {row.entry: row.configs[row.fastest] for row in rows})
            found += rows
    report(found, torch.cuda.get_device_name(device))
    print(f"kept in {tuning.cache_file()}")


def _gpu() -> torch.device:
    """The GPU whose kernels are measured."""
    lacks = [] if torch.cuda.is_available() else ["a GPU that PyTorch can use"]
    lacks += [] if find_spec("triton") else ["Triton, which PyTorch's builds for GPUs bring"]
    if lacks:
        rule = "kernels are measured where they run, and this machine lacks"
        raise MissingError(f"headway kernels tune: {rule} {' and '.join(lacks)}. Runs take default tiles.")
    return torch.device("cuda", torch.cuda.current_device())


def _calls(ops: Iterable[str], size: str | None) -> dict[str, Mapping[str, workloads.Call]]:
    """Calls by op and name of a size; ops that have not the size that is asked for are left out."""
    sizes = {op: workloads.sizes_of(op) for op in ops}
    if size is None:
        return sizes
    found: dict[str, Mapping[str, workloads.Call]] = {
        op: {size: calls[size]} for op, calls in sizes.items() if size in calls
    }
    if found:
        return found
    names = [name for calls in sizes.values() for name in calls]
    near = difflib.get_close_matches(size, names, n=1, cutoff=0)[0]
    raise JobError("--size", size, f"must be one of {'; '.join(dict.fromkeys(names))}", near)


def report(found: Sequence[Measured], gpu: str) -> None:
    """Print what was measured: of every space and key the default, the fastest and what it saves."""
    table = _table("kernel and key", "configurations", "default", "ms", "fastest", "ms", "saves", title=gpu)
    for row in found:
        best = row.fastest
        times = [row.typical(number) * 1e3 for number in (0, best)]
        default, fastest = (_told(row.configs[number].options) for number in (0, best))
        cells = row.entry, str(len(row.configs)), default, f"{times[0]:.3f}"
        if best:
            table.add_row(*cells, fastest, f"{times[1]:.3f}", f"{1 - times[1] / times[0]:.0%}")
        else:
            table.add_row(*cells, "the default", "", "")
    console().print(table)


def show() -> None:
    """Print this machine's GPU, the choices that were measured, their file, and the GPUs that have tiles."""
    print("\n".join(_here()))
    choices = _table("GPU", "kernel and key", "tiles", title="measured choices")
    for gpu, entries in tuning.known().items():
        for entry, options in entries.items():
            choices.add_row(gpu, entry, _told(options))
    known = _table(
        "target", "figures of", "16-bit TFLOP/s", "fp32 TFLOP/s", "TB/s", "shared KiB", title="targets"
    )
    for target in TARGETS.values():
        rates = (f"{rate / 1e12:,.1f}" for rate in (target.narrow, target.wide, target.bandwidth))
        known.add_row(target.name, target.product, *rates, f"{target.shared / 1024:.0f}")
    if choices.row_count:
        console().print(choices)
    console().print(known)


def _here() -> Iterator[str]:
    """Lines: this GPU and its tiles, and the file of choices."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        yield f"GPU: {torch.cuda.get_device_name(device)}, tiles of {target_of(device)}"
    else:
        yield "GPU: none that PyTorch can use"
    if not find_spec("triton"):
        yield "Triton: not installed"
    file = tuning.cache_file()
    yield f"choices: {file}{'' if file.exists() else ' (nothing was measured yet: headway kernels tune)'}"


def _told(options: Mapping[str, Any]) -> str:
    """Tiles, warps and stages in a word each."""
    names = {"num_warps": "warps", "num_stages": "stages"}
    return ", ".join(f"{names.get(name, name)} {value}" for name, value in options.items())


def _table(*titles: str, title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for name in titles:
        table.add_column(name, overflow="fold", justify="right" if name in ("ms", "saves") else "left")
    return table
