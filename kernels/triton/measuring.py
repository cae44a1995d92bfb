"""Times of kernels' configurations on a GPU, and which of them it is to have from now on.

A call of `workloads` is carried out with one space's configuration after another, its launches are written down, and
those that go by this space are timed, each by itself. Operands stay what the first launch has made of them: kernels
that write over theirs are timed on other numbers the second time, which takes as long.
"""

from __future__ import annotations

import math
import statistics
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
from triton.errors import TritonError

from headway.kernels.triton.launches import Launch, recorded
from headway.kernels.triton.targets import target_of
from headway.kernels.triton.tuning import Config, forced
from headway.kernels.triton.workloads import Call

MARGIN = 0.03
"""Of the default's time: what does not save so much stays, as it may be chance."""
Measure = Callable[[Launch], float]


class Measured(NamedTuple):
    """What a space and a key were measured to take.

    Attributes:
        entry: `Space.entry`.
        configs: the default first.
        seconds: of each of them, of all launches of a size together, by size; infinite where it cannot be launched.
    """

    entry: str
    configs: list[Config]
    seconds: list[list[float]]

    def typical(self, number: int) -> float:
        """Seconds of a configuration: the geometric mean over sizes, so that none counts more than others."""
        return math.exp(statistics.fmean(map(math.log, self.seconds[number])))

    @property
    def fastest(self) -> int:
        """Which is to be taken: the default, unless another is faster by more than MARGIN."""
        best = min(range(len(self.configs)), key=self.typical)
        return best if self.typical(best) < (1 - MARGIN) * self.typical(0) else 0


def seconds_of(launch: Launch) -> float:
    """Median time of a launch on the current GPU, whose L2 cache is emptied before each."""
    from triton.testing import do_bench

    return float(do_bench(launch.run, return_mode="median")) * 1e-3


def launched(call: Call, device: torch.device) -> list[Launch]:
    """Launches of a call, on the same operands every time; on `meta` they are not carried out."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if cuda else []), recorded(run=device.type != "meta") as launches:
        torch.manual_seed(0)
        with torch.cuda.device(device) if cuda else nullcontext():
            call(device)
    return launches


def measure_all(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    target: str | None = None,
    measure: Measure = seconds_of,
    say: Callable[[str], None] = lambda what: None,
) -> list[Measured]:
    """Every configuration of every space that calls use.

    Args:
        calls: by names of sizes.
        target: whose configurations; the device's if left out.
        measure: seconds of a launch.
        say: told what is measured next.

    Returns:
        A row for every space and key; a size that does not fit into memory is left out, with a warning.
    """
    found: dict[str, Measured] = {}
    for size, call in calls.items():
        try:
            with forced(target or target_of(device)):
                taken = _of_size(size, call, device, measure, say)
        except torch.OutOfMemoryError:
            warnings.warn(f"{size}: not measured, it does not fit into the GPU's memory", stacklevel=2)
            continue
        for entry, (configs, seconds) in taken.items():
            row = found.setdefault(entry, Measured(entry, configs, [[] for _ in configs]))
            for times, spent in zip(row.seconds, seconds, strict=True):
                times.append(spent)
    return list(found.values())


def _of_size(
    size: str, call: Call, device: torch.device, measure: Measure, say: Callable[[str], None]
) -> dict[str, tuple[list[Config], list[float]]]:
    """Of a call: of every entry its configurations, and seconds of each."""
    spaces: dict[str, dict[str, list[Config]]] = defaultdict(dict)
    for launch in launched(call, torch.device("meta")):
        if launch.choice:
            spaces[launch.choice.space][launch.choice.entry] = launch.choice.configs
    found: dict[str, tuple[list[Config], list[float]]] = {}
    for space, entries in spaces.items():
        times = {entry: [math.inf] * len(configs) for entry, configs in entries.items()}
        for number in range(max(map(len, times.values()))):
            say(f"{space}, {size}: configuration {number + 1} of {max(map(len, times.values()))}")
            for entry, spent in _forced_times(space, number, call, device, measure).items():
                times[entry][number] = spent
        found |= {entry: (configs, times[entry]) for entry, configs in entries.items()}
    return found


def _forced_times(
    space: str, number: int, call: Call, device: torch.device, measure: Measure
) -> dict[str, float]:
    """Seconds of a call's launches that go by a space, with its configuration of this number, by entry; none of those
    that have no such configuration, and none at all where one of them cannot be launched."""
    spent: dict[str, float] = defaultdict(float)
    try:
        with forced(None, **{space: number}):
            launches = launched(call, device)
        for launch in launches:
            choice = launch.choice
            if choice and choice.space == space and choice.number == number:
                spent[choice.entry] += measure(launch)
    except TritonError:  # it asks for more than the GPU has
        return {}
    return spent
