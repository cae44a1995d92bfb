"""Energy that nobody measures: the thermal design power of a device times the seconds it was the run's.

An upper bound of a kind for the device itself, which is seldom at its full power, and blind to everything around it.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

import torch

from headway.pretrain.device import device_name

WATTS_PER_THREAD = 4.0
"""Of processors that the table does not know; what CodeCarbon 3.3 takes for a hardware thread of such a one."""

# Watts of a device as torch counts it, from the makers' data sheets: the most that a board may draw. MI250 and MI250X
# are two devices for torch, each with half of the board's power.
_GPUS: list[tuple[str, float]] = [
    (r"Tesla V100-SXM2-\d+GB", 300),
    (r"Tesla V100S?-PCIE-\d+GB", 250),
    (r"Tesla T4", 70),
    (r"A100-SXM4-\d+GB", 400),
    (r"A100-PCIE-40GB", 250),
    (r"A100 80GB PCIe", 300),
    (r"A10", 150),
    (r"A30", 165),
    (r"A40|RTX A6000", 300),
    (r"L4", 72),
    (r"L40", 300),
    (r"L40S", 350),
    (r"GeForce RTX 3090", 350),
    (r"GeForce RTX 4090", 450),
    (r"GeForce RTX 5090", 575),
    (r"RTX 6000 Ada Generation", 300),
    (r"H100 80GB HBM3", 700),
    (r"H100 PCIe", 350),
    (r"H100 NVL", 400),
    (r"H200", 700),
    (r"H200 NVL", 600),
    (r"B200", 1000),
    (r"GB200", 1200),
    (r"AMD Instinct MI100", 300),
    (r"AMD Instinct MI210", 300),
    (r"AMD Instinct MI250", 250),
    (r"AMD Instinct MI250X", 280),
    (r"AMD Instinct MI300X", 750),
    (r"AMD Instinct MI325X", 1000),
]

# TDP in watts and hardware threads of one socket, from the makers' pages of specifications. Clouds' own models
# (8175M, 8259CL, 8275CL, 8375C) have no such page: as CodeCarbon 3.3 lists them.
_CPUS: dict[str, tuple[float, int]] = {
    "Intel Xeon E5-2680 v3": (120, 24),
    "Intel Xeon E5-2680 v4": (120, 28),
    "Intel Xeon E5-2690 v4": (135, 28),
    "Intel Xeon Gold 6130": (125, 32),
    "Intel Xeon Gold 6148": (150, 40),
    "Intel Xeon Gold 6226R": (150, 32),
    "Intel Xeon Gold 6230": (125, 40),
    "Intel Xeon Gold 6240": (150, 36),
    "Intel Xeon Gold 6248": (150, 40),
    "Intel Xeon Gold 6248R": (205, 48),
    "Intel Xeon Gold 6330": (205, 56),
    "Intel Xeon Gold 6338": (205, 64),
    "Intel Xeon Gold 6348": (235, 56),
    "Intel Xeon Gold 6430": (270, 64),
    "Intel Xeon Platinum 8168": (205, 48),
    "Intel Xeon Platinum 8175M": (240, 48),
    "Intel Xeon Platinum 8176": (165, 56),
    "Intel Xeon Platinum 8259CL": (210, 48),
    "Intel Xeon Platinum 8260": (165, 48),
    "Intel Xeon Platinum 8275CL": (240, 48),
    "Intel Xeon Platinum 8280": (205, 56),
    "Intel Xeon Platinum 8358": (250, 64),
    "Intel Xeon Platinum 8375C": (300, 64),
    "Intel Xeon Platinum 8380": (270, 80),
    "Intel Xeon Platinum 8468": (350, 96),
    "Intel Xeon Platinum 8470": (350, 104),
    "Intel Xeon Platinum 8480+": (350, 112),
    "Intel Xeon Platinum 8490H": (350, 120),
    "Intel Xeon Platinum 8558": (330, 96),
    "Intel Xeon Platinum 8568Y+": (350, 96),
    "Intel Xeon Platinum 8570": (350, 112),
    "Intel Xeon Platinum 8580": (350, 120),
    "Intel Xeon Platinum 8592+": (350, 128),
    "AMD EPYC 7302": (155, 32),
    "AMD EPYC 7313": (155, 32),
    "AMD EPYC 7402": (180, 48),
    "AMD EPYC 7452": (155, 64),
    "AMD EPYC 7453": (225, 56),
    "AMD EPYC 7502": (180, 64),
    "AMD EPYC 7542": (225, 64),
    "AMD EPYC 7543": (225, 64),
    "AMD EPYC 7642": (225, 96),
    "AMD EPYC 7662": (225, 128),
    "AMD EPYC 7702": (200, 128),
    "AMD EPYC 7713": (225, 128),
    "AMD EPYC 7742": (225, 128),
    "AMD EPYC 7763": (280, 128),
    "AMD EPYC 9124": (200, 32),
    "AMD EPYC 9254": (200, 48),
    "AMD EPYC 9334": (210, 64),
    "AMD EPYC 9354": (280, 64),
    "AMD EPYC 9454": (290, 96),
    "AMD EPYC 9534": (280, 128),
    "AMD EPYC 9554": (360, 128),
    "AMD EPYC 9654": (360, 192),
    "AMD EPYC 9754": (360, 256),
    "AMD EPYC 9755": (500, 256),
    "AMD EPYC 9965": (500, 384),
    "AMD Ryzen 9 5950X": (105, 32),
    "AMD Ryzen 9 7950X": (170, 32),
    "Intel Core i9-13900K": (125, 32),
}


class Rated:
    """Power times time."""

    estimate = True

    def __init__(self, watts: float, words: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.watts, self._clock, self._begun = watts, clock, clock()
        self.source = f"estimate: {words}"

    def joules(self) -> float:
        return self.watts * (self._clock() - self._begun)

    def close(self) -> None: ...


def open_rated(device: torch.device, stated: float | None, threads: int) -> Rated:
    """An estimate for a rank's device: watts that the job states, else those of the tables.

    Args:
        stated: `tracking.energy.watts`.
        threads: of the CPU that this process computes with.
    """
    if stated is not None:
        return Rated(stated, f"{stated:g} W a rank, as tracking.energy.watts states")
    return Rated(*rating(device.type, device_name(device), threads))


def rating(kind: str, name: str, threads: int) -> tuple[float, str]:
    """Watts of a rank's device at full load, and where they come from.

    A processor's TDP counts in the share of its hardware threads that this process computes with. A GPU that the table
    does not know counts with the largest power in it: an estimate should rather be too high.
    """
    if kind == "cpu":
        known = _CPUS.get(plain_name(name))
        if known is None:
            words = f"{threads} threads x {WATTS_PER_THREAD:g} W (the TDP of {name} is not known)"
            return threads * WATTS_PER_THREAD, words
        watts, whole = known
        return watts * threads / whole, f"TDP {watts:g} W of {name} x {threads} of {whole} threads"
    bare = name.removeprefix("NVIDIA ")
    for pattern, watts in _GPUS:
        if re.fullmatch(pattern, bare):
            return watts, f"TDP {watts:g} W of {name}"
    most = max(watts for _, watts in _GPUS)
    return (
        most,
        f"{most:g} W, the most of any known GPU (the TDP of {name} is not known: tracking.energy.watts)",
    )


def plain_name(name: str) -> str:
    """A processor's name without marks, frequency and count of cores: `Intel Xeon Gold 6148`."""
    name = re.sub(r"\((R|TM)\)", "", name)
    name = re.sub(r"^\d+th Gen |\s*@.*$|\s+CPU\b|\s+\d+-Core Processor.*$", "", name)
    return " ".join(name.split())
