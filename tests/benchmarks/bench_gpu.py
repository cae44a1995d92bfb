"""Triton kernels on this GPU: what they reach of its peak and roofline, and how they stand beside what there is.

    python tests/benchmarks/bench_gpu.py [OP ...] [--rounds 30]

Of every kernel of every op and size, with the tiles that runs take: median time, TFLOP/s and GB/s of its loops, the
share of the GPU's peak that its busiest unit reaches, and of the roofline, that is the time of the least traffic and
of the products. Then forward and backward beside others', in turns, medians: a ratio above 1 says that ours is faster.
Peaks are those of the GPU in `targets.py` that is next. Without a GPU it says so, and ends.
"""

from __future__ import annotations

import argparse
import importlib
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from headway.kernels.triton import workloads
from headway.kernels.triton.targets import TARGETS, Target, target_of
from headway.tests.kernels.triton.finding import find_triton

if TYPE_CHECKING:
    from gpu_races import Race, Step

    from headway.kernels.triton.launches import Launch

APART = 2.0**-5
"""Of the largest number: how far results in bf16 may be apart, whose sums of thousands were rounded in other places."""


def missing() -> str:
    """What this machine lacks."""
    if not torch.cuda.is_available():
        return "no GPU that PyTorch can use"
    return "" if find_triton() else "no Triton"


# -- kernels -------------------------------------------------------------------------------------------------------


def kernels(
    op: str, device: torch.device, target: Target, measure: Callable[[Launch], float]
) -> Iterator[str]:
    """Lines of an op's kernels at its sizes; of a kernel that is launched more than once, of all launches together."""
    from headway.kernels.triton.measuring import launched

    costs = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}").COSTS
    for size, call in workloads.sizes_of(op).items():
        try:
            launches = launched(call, device)
        except torch.OutOfMemoryError:
            yield f"{op} {size}: does not fit into memory"
            continue
        for name in dict.fromkeys(launch.name for launch in launches):
            same = [launch for launch in launches if launch.name == name]
            yield kernel_line(size, same, costs[name], target, measure)


def kernel_line(
    size: str, launches: Sequence[Launch], cost: Any, target: Target, measure: Callable[[Launch], float]
) -> str:
    """What launches of one kernel reach."""
    from headway.tests.kernels.triton.proof import narrowest
    from headway.tests.kernels.triton.table import least_seconds, loop_seconds

    rows = [cost(launch)._asdict() | {"itemsize": narrowest(launch)} for launch in launches]
    seconds = sum(measure(launch) for launch in launches)
    flops, moved = (sum(sum(row[name] for name in names) for row in rows) for names in
                    (("products", "others"), ("read", "written")))  # fmt: skip
    busy, least = (sum(each(row, target) for row in rows) for each in (loop_seconds, least_seconds))
    name = launches[0].name.removesuffix("_kernel")
    return (
        f"{name:28} {size:44} {seconds / len(launches) * 1e3:9.3f} ms {flops / seconds / 1e12:8.1f} TFLOP/s "
        f"{moved / seconds / 1e9:8.0f} GB/s  {busy / seconds:4.0%} of peak  {least / seconds:4.0%} of roofline"
    )


# -- races ---------------------------------------------------------------------------------------------------------


def races(op: str, device: torch.device, rounds: int) -> Iterator[str]:
    """Lines of an op beside others' at the sizes of its races."""
    from gpu_races import RACES

    for size, make in RACES.get(op, {}).items():
        torch.compiler.reset()
        try:
            yield from (f"{op:14} {size:40} {line}" for line in race_lines(make(device), rounds, timed))
        except torch.OutOfMemoryError:
            yield f"{op:14} {size:40} does not fit into memory"


def race_lines(race: Race, rounds: int, clock: Callable[[Step], float]) -> Iterator[str]:
    """A line for every rival: those that cannot be called are told and left out.

    Args:
        clock: seconds of a step.
    """
    wanted = race.ours()
    runners = {"ours": race.ours}
    for name, step in race.theirs.items():
        try:
            found = step()
        except (RuntimeError, ValueError, NotImplementedError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            yield f"{name}: cannot, {str(error).splitlines()[0]}"
            continue
        if race.alike:
            check(name, wanted, found)
        runners[name] = step
        del found
    del wanted
    spent = medians(runners, rounds, clock)
    for name in list(runners)[1:]:
        ours, theirs = spent["ours"] * 1e3, spent[name] * 1e3
        yield f"ours {ours:9.3f} ms, {name:14} {theirs:9.3f} ms, ratio {theirs / ours:.2f}x"


def check(name: str, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Assert that both have found the same."""
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        apart, size = float((a.detach().double() - b.detach()).abs().max()), float(b.detach().abs().max())
        assert apart <= APART * size, (
            f"{name}: result {number} is {apart:.3g} from ours, and as large as {size:.3g}"
        )


def medians(steps: Mapping[str, Step], rounds: int, clock: Callable[[Step], float]) -> dict[str, float]:
    """Median seconds of steps that take turns, each round in the other direction; two rounds warm up."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 2):
        for name in list(steps)[:: 1 if number % 2 else -1]:
            spent = clock(steps[name])
            if number >= 2:
                times[name].append(spent)
    return {name: statistics.median(spent) for name, spent in times.items()}


def timed(step: Step) -> float:
    """Seconds of a step on the GPU, whose L2 cache is emptied before."""
    from triton.runtime import driver

    driver.active.clear_cache(driver.active.get_empty_cache_for_benchmark())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def main(*given: str) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ops", nargs="*", help="all if none are named")
    parser.add_argument("--rounds", type=int, default=30, help="measured steps of each in a race")
    asked = parser.parse_args(given)
    if lack := missing():
        print(f"{lack}: nothing is measured")
        return 0
    from gpu_races import RACES

    from headway.kernels.triton.measuring import seconds_of

    known = sorted({*workloads.OPS, *RACES})
    if unknown := [op for op in asked.ops if op not in known]:
        parser.error(f"{unknown[0]}: one of {', '.join(known)}")
    device = torch.device("cuda", torch.cuda.current_device())
    target = TARGETS[target_of(device)]
    print(f"{torch.cuda.get_device_name(device)}; peaks are those of {target.product}")
    for op in asked.ops or known:
        for line in kernels(op, device, target, seconds_of) if op in workloads.OPS else ():
            print(line, flush=True)
        for line in races(op, device, asked.rounds):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
