"""Every Triton kernel, without a GPU: its numbers and what it moves, interpreted; with one, its numbers there."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch

from headway.kernels.triton.targets import TARGETS
from headway.tests.kernels.triton.finding import find_triton
from headway.tests.kernels.triton.interpret import deviation
from headway.tests.kernels.triton.proof import OPS
from headway.tests.kernels.triton.table import broken, compiled, finished, table, written

MATRIX = 6
"""Cases of an op in the matrix; the first is always interpreted, and all of them in `make long`."""

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


def names_of(op: str) -> list[str]:
    return list(importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}").CASES)


def chosen(op: str) -> dict[str, list[str]]:
    """Names of an op's cases by the mark of where they are run; those of the matrix evenly over what cases vary."""
    first, *others = names_of(op)
    matrix = others[:: -(-len(others) // MATRIX)] if others else []
    return {"": [first], "matrix": matrix, "long": [name for name in others if name not in matrix]}


def cases() -> Iterator[Any]:
    """Mark, op and name of all cases; those of an op in one process of the tests."""
    for op in OPS if find_triton() else ():
        for where, names in chosen(op).items():
            marks = [pytest.mark.xdist_group(f"kernel {op}"), getattr(pytest.mark, where)] if where else []
            yield from (pytest.param(where, op, name, marks=marks) for name in names)


@cache
def interpreted(seed: str, *asked: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "headway.tests.kernels.triton.interpret", *asked]
    environment = {"HEADWAY_TEST_SEED": seed} | os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def answer(where: str, op: str, name: str) -> tuple[int, dict[str, Any]]:
    """The seed and what was computed of a case; one process computes all that are always run, or those of an op."""
    together = OPS if not where else (op,)
    seed = "" if where == "long" else "0"  # fresh operands every time, or the same
    found = interpreted(seed, *(word for o in together for n in chosen(o)[where] for word in (o, n)))
    return found["seed"], next(x for x in found["cases"] if (x["op"], x["name"]) == (op, name))


@pytest.mark.parametrize(("where", "op", "name"), cases())
def test_numbers_are_those_of_the_reference(where: str, op: str, name: str) -> None:
    seed, found = answer(where, op, name)
    far = {what: pair for what, pair in found["apart"].items() if not pair[0] <= pair[1]}
    assert not far, f"HEADWAY_TEST_SEED={seed}: apart, and tolerance"


@pytest.mark.parametrize(("where", "op", "name"), cases())
def test_loops_move_and_multiply_what_their_formulas_say(where: str, op: str, name: str) -> None:
    _, found = answer(where, op, name)
    assert found["counted"] == found["expected"], "bytes read, bytes written, FLOPs of products"


@pytest.mark.matrix
@pytest.mark.parametrize("op", finished())
def test_kernels_compile_for_a_gpu_that_is_not_here(op: str) -> None:
    """For the H100; `make kernels` compiles for all targets."""
    rows = compiled(op, most=1, targets=("sm_90a",))
    assert [fault for row in rows for fault in broken(row)] == []
    assert table(rows, ["sm_90a"]) == written(op, ["sm_90a"]), "docs/kernels.md is old: run `make kernels`"


@pytest.mark.long
@pytest.mark.parametrize("op", finished())
def test_every_configuration_compiles_for_every_gpu(op: str) -> None:
    rows = compiled(op)
    assert {row["target"] for row in rows} == set(TARGETS)
    assert [fault for row in rows for fault in broken(row)] == []
    assert table(rows) == written(op, TARGETS)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in names_of(op)])
def test_a_gpu_gives_what_the_reference_gives(op: str, name: str) -> None:
    module = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")
    for what, result in module.CASES[name](torch.device("cuda")).items():
        apart, tolerance = deviation(*result)
        assert apart <= tolerance, what
