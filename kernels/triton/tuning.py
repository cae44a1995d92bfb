"""With which tiles a kernel is compiled: a default for every target, or what was measured on this machine.

The first of a space is the default. Nothing is measured on the way, so a first step is as fast as any, and all ranks
compute alike; `headway kernels tune` measures all of a space and writes down the fastest, by GPU, kernel and key. Other
tiles sum in another order, hence round otherwise. What is written down are tiles, warps and stages themselves: where a
space no longer has them, the default is taken.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
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
        registers: of a thread at most, on NVIDIA's. Without it their assembler may take fewer than there are and spill
            some, so that more programs fit at once.
    """

    tiles: Mapping[str, int]
    warps: int = 4
    stages: int = 2
    registers: int | None = None

    @property
    def options(self) -> dict[str, int]:
        """As arguments of a launch."""
        found = {**self.tiles, "num_warps": self.warps, "num_stages": self.stages}
        return found if self.registers is None else found | {"maxnreg": self.registers}


class Choice(NamedTuple):
    """What `Space.choose` has chosen.

    Attributes:
        space: its name.
        entry: `Space.entry`: the space and the key.
        configs: what there was to choose from, the default first.
        number: of the one that was chosen.
    """

    space: str
    entry: str
    configs: list[Config]
    number: int

    @property
    def config(self) -> Config:
        """The chosen one."""
        return self.configs[self.number]


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
        choices, entry = self.of(_FORCED.get("target") or target_of(device), **key), self.entry(key)
        number: int | None = _FORCED.get(self.name)
        if number is None and (options := measured(device).get(entry)):
            number = next((n for n, config in enumerate(choices) if config.options == options), 0)
        choice = Choice(self.name, entry, choices, number if number and number < len(choices) else 0)
        for tell in _WATCHERS:
            tell(choice)
        return choice.config

    def entry(self, key: Mapping[str, Any]) -> str:
        """The name of a choice in the cache."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in sorted(key.items()))])


_FORCED: dict[str, Any] = {}
_WATCHERS: list[Callable[[Choice], None]] = []


@contextmanager
def forced(target: str | None = None, **numbers: int) -> Iterator[None]:
    """Within it, spaces of these names give the configuration of this number, or the default if they have none of it;
    all spaces as on `target`, if one is given."""
    before = dict(_FORCED)
    _FORCED.update(numbers, **({"target": target} if target else {}))
    try:
        yield
    finally:
        _FORCED.clear()
        _FORCED.update(before)


@contextmanager
def watched(tell: Callable[[Choice], None]) -> Iterator[None]:
    """Within it, `tell` hears of every choice before its kernel is launched."""
    _WATCHERS.append(tell)
    try:
        yield
    finally:
        _WATCHERS.remove(tell)


def cache_file() -> Path:
    """Where choices are kept: in $HEADWAY_CACHE, else in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("HEADWAY_CACHE") or Path(base) / "headway") / "kernels.json"


Options = dict[str, int]
"""`Config.options`, as they are written down."""


@cache
def measured(device: torch.device) -> dict[str, Options]:
    """Choices that were measured on a GPU of this kind, by `Space.entry`; none where nobody has."""
    return known().get(torch.cuda.get_device_name(device), {}) if device.type == "cuda" else {}


def known() -> dict[str, dict[str, Options]]:
    """All choices that were measured, by GPU; none, and a warning, of a file that cannot be read."""
    try:
        found = json.loads(cache_file().read_text())
        if not isinstance(found, dict) or not all(isinstance(gpu, dict) for gpu in found.values()):
            raise ValueError("not an object of objects")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"{cache_file()}: choices of tiles are not used: {error}; remove it", stacklevel=2)
        return {}
    return found


def remember(device: torch.device, choices: Mapping[str, Config]) -> Path:
    """Write down choices by `Space.entry`, beside what is there; returns the file."""
    file = cache_file()
    everything = known()
    chosen = {entry: config.options for entry, config in choices.items()}
    everything.setdefault(torch.cuda.get_device_name(device), {}).update(chosen)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps(everything, indent=1, sort_keys=True) + "\n")
    os.replace(part, file)
    measured.cache_clear()
    return file
