"""With which tiles a kernel is compiled: a default for every target, or what was measured on this machine.

The first of a space is the default. Nothing is measured on the way, so a first step is as fast as any, and all ranks
compute alike; `headway kernels tune` measures all of a space and writes down the fastest, by GPU, kernel and key. Other
tiles sum in another order, hence round otherwise.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from headway.kernels.triton.targets import target_of


class Config(NamedTuple):
    """What a kernel is compiled with.

    Attributes:
        tiles: its constants that are sizes of tiles, by name.
        warps: of a program.
        stages: of its pipeline of loads.
    """

    tiles: Mapping[str, int]
    warps: int = 4
    stages: int = 2

    @property
    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        return {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}


class Space(NamedTuple):
    """The configurations of a kernel, by target and by what its tiles depend on.

    Attributes:
        name: of the kernel, in the cache and in tables.
        configs: (target, **key) -> configurations, the default first.
    """

    name: str
    configs: Any

    def of(self, target: str, **key: Any) -> list[Config]:
        """All that may be chosen."""
        found: list[Config] = self.configs(target, **key)
        return found

    def choose(self, device: torch.device, **key: Any) -> Config:
        """The one to launch with on a device."""
        choices = self.of(_FORCED.get("target") or target_of(device), **key)
        if (number := _FORCED.get(self.name)) is None:
            number = measured(device).get(self.entry(key), 0)
        return choices[number if number < len(choices) else 0]

    def entry(self, key: Mapping[str, Any]) -> str:
        """The name of a choice in the cache."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in sorted(key.items()))])


_FORCED: dict[str, Any] = {}


@contextmanager
def forced(target: str | None = None, **numbers: int) -> Iterator[None]:
    """Within it, spaces of these names give the configuration of this number, as on `target`."""
    before = dict(_FORCED)
    _FORCED.update(numbers, target=target)
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


def cache_file() -> Path:
    """Where choices are kept: in $HEADWAY_CACHE, else in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HEADWAY_CACHE") or Path(base) / "headway") / "kernels.json"


@cache
def measured(device: torch.device) -> dict[str, int]:
    """Choices that were measured on a GPU of this kind, by `Space.entry`; none where nobody has."""
    return _known().get(torch.cuda.get_device_name(device), {}) if device.type == "cuda" else {}


def _known() -> dict[str, dict[str, int]]:
    """All choices that were measured, by GPU; none, and a warning, of a file that cannot be read."""
    try:
        found: dict[str, dict[str, int]] = json.loads(cache_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{cache_file()}: choices of tiles are not used: {error}; remove it", stacklevel=2)
        return {}
    return found


def remember(device: torch.device, choices: Mapping[str, int]) -> Path:
    """Write down choices, beside what is there; returns the file."""
    file = cache_file()
    everything = _known()
    everything.setdefault(torch.cuda.get_device_name(device), {}).update(choices)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    os.replace(part, file)
    measured.cache_clear()
    return file
