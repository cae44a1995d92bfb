"""A program of the tests: what the tables of docs/kernels.md are of, as a digest of each op that is named, as JSON.

Of an op's kernels as all targets and configurations launch them: their code and that of what they call, without
comments; constants, dtypes and sizes of a launch; and what its loops cost. Nothing is compiled.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from headway.tests.kernels.triton.finding import find_triton


def main(*ops: str) -> None:
    print(json.dumps({op: digest(op) for op in ops} if find_triton() else None))


def digest(op: str) -> str:
    """Sixteen digits."""
    from headway.kernels.triton.targets import TARGETS
    from headway.tests.kernels.triton.compile import launches_of, signature

    module = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")
    said, kernels = set(), {}
    for target in TARGETS:
        for launch in (each.launch for each in launches_of(op, target)):
            kernels[launch.name] = launch.kernel
            cost = module.COSTS[launch.name](launch)
            said.add(f"{target} {launch.name} {launch.grid} {signature(launch)} {tuple(map(float, cost))}")
    code = {line for kernel in kernels.values() for line in code_of(kernel, set())}
    return hashlib.blake2b("\n".join(sorted(said | code)).encode(), digest_size=8).hexdigest()


def code_of(kernel: Any, seen: set[Any]) -> Iterator[str]:
    """Code of a kernel and of all of ours that it calls, and constants that they read."""
    from triton.language import constexpr
    from triton.runtime.jit import JITFunction

    if kernel in seen:
        return
    seen.add(kernel)
    tree = ast.parse(kernel.src)
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    if ast.get_docstring(function):
        function.body = function.body[1:]
    yield ast.dump(function)
    for name, value in _read(function, kernel.fn.__globals__):
        if isinstance(value, JITFunction) and value.__module__.startswith("headway"):
            yield from code_of(value, seen)
        elif isinstance(value, constexpr | int | float | str):
            yield f"{name} = {value}"


def _read(function: ast.FunctionDef, known: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Globals that a function names, and what it takes from modules."""
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and node.id in known:
            yield node.id, known[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = known.get(node.value.id)
            if isinstance(module, ModuleType):
                yield node.attr, getattr(module, node.attr, None)


if __name__ == "__main__":
    main(*sys.argv[1:])
