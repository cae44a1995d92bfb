"""Energy of processors and their memory by RAPL, as Linux shows it (Documentation/power/powercap/powercap.rst).

    /sys/class/powercap/intel-rapl:0/{name, energy_uj, max_energy_range_uj}      a package; AMD's have the same names
    /sys/class/powercap/intel-rapl:0:2/...                                       a part of it: core, uncore, dram

Packages hold their cores; memory (`dram`) stands beside them and is added. `psys`, the whole board of some laptops,
holds the packages and is left out, as is the second view of packages under `intel-rapl-mmio`.
"""

from __future__ import annotations

import threading
from pathlib import Path

from headway.pretrain.energy.counter import Sampler, Unmeasured

POWERCAP = Path("/sys/class/powercap")

OFTEN = 30.0
"""Seconds after which counters are read though nobody asks: some begin again at 65 kJ, which 1 kW uses in 65 s."""


class Rapl:
    """Sum of the domains; their counters begin again at a range of their own."""

    estimate = False

    def __init__(self, domains: list[Path]) -> None:
        """
        Args:
            domains: folders of the domains, each counted in full.
        """
        self._lock = threading.Lock()
        self._domains = domains
        self._ranges = [_number(domain / "max_energy_range_uj") for domain in domains]
        self._last = [_number(domain / "energy_uj") for domain in domains]
        self._total = 0
        self.source = "RAPL " + ", ".join(dict.fromkeys((d / "name").read_text().strip() for d in domains))
        self._sampler = Sampler(OFTEN, self._poll)

    def joules(self) -> float:
        with self._lock:
            for place, domain in enumerate(self._domains):
                now = _number(domain / "energy_uj")
                self._total += gained(self._last[place], now, self._ranges[place])
                self._last[place] = now
            return self._total / 1e6

    def _poll(self) -> None:
        try:
            self.joules()
        except Unmeasured:  # who reads next is told
            return

    def close(self) -> None:
        self._sampler.close()


def gained(last: int, now: int, limit: int) -> int:
    """Microjoules between two readings of a counter that begins again after `limit`, at most once."""
    return now - last if now >= last else now - last + limit


def open_rapl(powercap: Path = POWERCAP) -> Rapl:
    """All packages of this node, and their memory.

    Raises:
        Unmeasured: there are none, or they are not ours to read (the kernel shows them to root alone since
            CVE-2020-8694).
    """
    try:
        found = [
            (path, (path / "name").read_text().strip()) for path in sorted(powercap.glob("intel-rapl:*"))
        ]
    except OSError as error:
        raise Unmeasured(f"{error.filename}: {error.strerror}") from None
    packages = [path for path, name in found if name.startswith("package")]
    if not packages:
        raise Unmeasured(f"{powercap} has no packages: a virtual machine, a container, or no such processor")
    return Rapl(packages + [path for path, name in found if name == "dram"])


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        rule = "only root may read it; `chmod a+r` or a udev rule opens it to others"
        raise Unmeasured(f"{path}: {rule}") from None
    except OSError as error:
        raise Unmeasured(f"{path}: {error.strerror}") from None
    except ValueError:
        raise Unmeasured(f"{path} holds no number") from None
