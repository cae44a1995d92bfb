"""What a rank's share of a run's energy is: counters of its device and of its host, or an estimate of them.

Every rank measures its own device; what a node measures as a whole (RAPL) is read by the node's first rank alone, so
that the sum over all ranks counts everything once.

    device   source      measured by
    CUDA     auto        NVML, else the TDP; and RAPL for the host where it can be read
    CPU      auto        RAPL, else the TDP
    either   rapl, nvml  that alone; an error where it is not to be had
    either   tdp         the TDP alone

Both measure more than the run on a shared machine: RAPL all that its processors do, NVML the whole GPU (also of a MIG
slice). Neither sees fans, disks, power supplies and network.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from headway.pretrain.config.run import Energy
from headway.pretrain.energy.counter import Counter, Reading, Unmeasured
from headway.pretrain.energy.nvml import open_nvml
from headway.pretrain.energy.rapl import POWERCAP, open_rapl
from headway.pretrain.energy.rated import open_rated
from headway.pretrain.errors import JobError


@dataclass
class Meter:
    """The counters of one rank, read together.

    Attributes:
        source: what measures, in words; an estimate says that it is one.
        estimate: whether any counter is one.
        notes: what people should know of it.
        troubles: why counters stopped, to be told; a counter that fails is left out from then on.
    """

    counters: list[Counter]
    source: str
    estimate: bool
    notes: list[str] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._last, self._time = [counter.joules() for counter in self.counters], self.clock()

    def take(self) -> Reading:
        """What was used since the last call, or since the meter was opened."""
        now, joules = self.clock(), 0.0
        for place, counter in reversed(list(enumerate(self.counters))):
            try:
                total = counter.joules()
            except Unmeasured as error:
                self.troubles.append(f"energy is no longer counted by {counter.source}: {error}")
                counter.close()
                del self.counters[place], self._last[place]
                continue
            joules += total - self._last[place]
            self._last[place] = total
        seconds, self._time = now - self._time, now
        return Reading(joules, seconds)

    def close(self) -> None:
        for counter in self.counters:
            counter.close()


def open_meter(
    settings: Energy, device: torch.device, local_rank: int, threads: int, *, powercap: Path = POWERCAP
) -> Meter | None:
    """The meter of this rank; None where `tracking.energy.source` is off.

    Args:
        threads: of the CPU that this process computes with.
        powercap: where the kernel shows RAPL.

    Raises:
        JobError: the source that was asked for is not to be had here.
    """
    source, gpu = settings.source, device.type == "cuda"
    if source == "off":
        return None
    counters: list[Counter] = []
    words: list[str] = []
    notes: list[str] = []
    measured = False  # the device that computes
    if source == "nvml" or (source == "auto" and gpu):
        try:
            counters.append(open_nvml(device))
            measured = True
            notes.append("NVML measures the whole GPU, whoever uses it")
        except Unmeasured as error:
            _refuse(source, error)
            notes.append(f"not measured by NVML: {error}")
    if source in ("auto", "rapl"):
        try:
            host = open_rapl(powercap)
        except Unmeasured as error:
            _refuse(source, error)
            notes.append(f"{'the host is not counted' if gpu else 'not measured by RAPL'}: {error}")
        else:
            measured |= source == "rapl" or not gpu
            notes.append("RAPL measures all that the processors of a node do, for whomever")
            if local_rank == 0:
                counters.append(host)
            else:  # the node's first rank reads it
                words.append(host.source)
                host.close()
    if not measured:
        counters.insert(0, open_rated(device, settings.watts, threads))
    if source == "rapl" and gpu:
        notes.append("GPUs are not counted: tracking.energy.source is rapl")
    words = [counter.source for counter in counters] + words
    return Meter(counters, " + ".join(words), any(counter.estimate for counter in counters), notes)


def _refuse(source: str, error: Unmeasured) -> None:
    """What was asked for by name is an error where it is missing."""
    if source != "auto":
        raise JobError("tracking.energy.source", source, str(error), "auto") from None
