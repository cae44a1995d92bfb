"""Launches of kernels, written down with the choice of tiles that each goes by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from headway.kernels.triton.tuning import Choice, watched


class Launch(NamedTuple):
    """A kernel, its grid, and what it is given by position and by name.

    Attributes:
        choice: of its tiles; None of a kernel that has no space.
    """

    kernel: Any
    grid: tuple[int, ...]
    given: tuple[Any, ...]
    options: dict[str, Any]
    choice: Choice | None = None

    @property
    def name(self) -> str:
        return str(self.kernel.__name__)

    @property
    def programs(self) -> int:
        """How many there are."""
        return math.prod(self.grid)

    @property
    def arguments(self) -> dict[str, Any]:
        """By the kernel's names, the compiler's options among them."""
        return dict(zip(self.kernel.arg_names, self.given, strict=False)) | self.options

    @property
    def tensors(self) -> list[torch.Tensor]:
        """All that are given, those in tuples too."""
        return list(_tensors(self.given))

    def run(self) -> None:
        """Carry it out, on the current device."""
        self.kernel.run(*self.given, grid=self.grid, warmup=False, **self.options)


def _tensors(x: Any) -> Iterator[torch.Tensor]:
    if isinstance(x, torch.Tensor):
        yield x
    elif isinstance(x, tuple):
        for each in x:
            yield from _tensors(each)


@contextmanager
def recorded(*, run: bool = False) -> Iterator[list[Launch]]:
    """Launches within it, in order; they are carried out if `run`."""
    from triton.runtime import jit

    found: list[Launch] = []
    choices: list[Choice] = []

    def launcher(kernel: Any, grid: Any) -> Any:
        def launch(*given: Any, **options: Any) -> None:
            named = dict(zip(kernel.arg_names, given, strict=False)) | options
            size = tuple(grid(named) if callable(grid) else grid)
            found.append(Launch(kernel, size, given, options, _choice(choices, options)))
            if run:
                found[-1].run()

        return launch

    interface: Any = jit.KernelInterface
    plain = interface.__getitem__
    interface.__getitem__ = launcher
    try:
        with watched(choices.append):
            yield found
    finally:
        interface.__getitem__ = plain


def _choice(choices: list[Choice], options: Mapping[str, Any]) -> Choice | None:
    """The latest choice that a launch may go by: all ops choose, then launch."""
    return next((each for each in reversed(choices) if each.config.options.items() <= options.items()), None)
