"""A program of the tests: an op's kernels compiled for GPUs that need not be here, as JSON.

Arguments: the op, how many configurations of a space at most (0: all), then targets. Of every kernel, target and
configuration: what it takes, and of every size what its loops cost. A process of its own because PyTorch, too, uses a
Triton that it finds.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from headway.tests.kernels.triton.finding import find_triton


def main(op: str, most: str, *targets: str) -> None:
    if not find_triton():
        print("null")
        return
    print(json.dumps([row for target in targets for row in rows(op, target, int(most) or None)]))


class Recorded(NamedTuple):
    """A launch, of which size it is, and whether all spaces gave their defaults."""

    launch: Any
    size: str
    default: bool


def launches_of(op: str, target: str, most: int | None = None) -> Iterator[Recorded]:
    """All launches of an op on a target, the default configurations first.

    Args:
        most: configurations of a space at most; a space with fewer gives its default for the others.
    """
    from headway.kernels.triton import workloads
    from headway.kernels.triton.tuning import Choice, Space, forced, watched
    from headway.tests.kernels.triton.launches import recorded

    module = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")
    spaces = [x.name for x in vars(_kernels(op)).values() if isinstance(x, Space)]
    sizes = {name: partial(call, torch.device("meta")) for name, call in workloads.sizes_of(op).items()}
    for size, call in (sizes | getattr(module, "COMPILED", {})).items():
        number, count = 0, 1
        while number < min(count, most or count):
            choices: list[Choice] = []
            with (
                forced(target, **dict.fromkeys(spaces, number)),
                watched(choices.append),
                recorded() as launches,
            ):
                call()
            count = max([1, *(len(choice.configs) for choice in choices)])
            yield from (Recorded(launch, size, number == 0 and size in sizes) for launch in launches)
            number += 1


def rows(op: str, target: str, most: int | None = None) -> list[dict[str, Any]]:
    """A row for every kernel, size and way to compile it, the default first."""
    from headway.kernels.triton.targets import TARGETS
    from headway.tests.kernels.triton.launches import compiled, resources
    from headway.tests.kernels.triton.proof import narrowest

    module = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")
    known: dict[str, Any] = {}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for launch, size, default in launches_of(op, target, most):
        key = f"{launch.name} {signature(launch)}"
        if key not in known:
            known[key] = resources(compiled(launch, TARGETS[target]), TARGETS[target])._asdict()
        row = {"op": op, "kernel": launch.name, "target": target, "size": size, "default": default}
        row["itemsize"] = narrowest(launch)
        row["narrow"] = getattr(module, "NARROW", {}).get(launch.name, "")
        how = {k: v for k, v in launch.options.items() if isinstance(v, int)}
        cost = module.COSTS[launch.name](launch)._asdict()
        found.setdefault((key, size), row | {"how": how} | known[key] | cost)
    return list(found.values())


def _kernels(op: str) -> Any:
    return importlib.import_module(f"headway.kernels.triton.{op}")


def signature(launch: Any) -> str:
    """What another compilation would be for: constants, dtypes, what is not there, and what divides by 16."""
    parts = [f"{k}={v}" for k, v in sorted(launch.options.items())]
    return " ".join(parts + [_kind(x) for x in launch.given])


def _kind(x: Any) -> str:
    if isinstance(x, tuple):
        return "(" + " ".join(map(_kind, x)) + ")"
    if isinstance(x, int):
        return f"i{x if x == 1 else x % 16 == 0}"
    return str(getattr(x, "dtype", x))


if __name__ == "__main__":
    main(*sys.argv[1:])
