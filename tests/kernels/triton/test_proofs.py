"""Every Triton kernel, without a GPU: its numbers and what it moves, interpreted; with one, its numbers there."""

import importlib
import json
import os
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch

from headway.kernels.triton.targets import TARGETS
from headway.tests.kernels.triton.finding import find_triton
from headway.tests.kernels.triton.interpret import deviation
from headway.tests.kernels.triton.proof import OPS
from headway.tests.kernels.triton.table import PAGE, broken, compiled, table

ALWAYS = 4
"""Cases of an op that are always interpreted; the others in the matrix."""

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


def cases() -> list[Any]:
    """Of all ops; the first are always run, evenly over what they vary."""
    if not find_triton():
        return []
    found = []
    for op in OPS:
        names = names_of(op)
        few = names[:: -(-len(names) // ALWAYS)]
        found += [pytest.param(op, n, marks=() if n in few else pytest.mark.matrix) for n in names]
    return found


def names_of(op: str) -> list[str]:
    return list(importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}").CASES)


@cache
def interpreted(op: str, few: bool) -> dict[str, Any]:
    names = names_of(op)
    always = names[:: -(-len(names) // ALWAYS)]
    chosen = [name for name in names if (name in always) == few]
    command = [sys.executable, "-m", "headway.tests.kernels.triton.interpret", op, *chosen]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def answer(op: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    few = interpreted(op, True)
    found = few if name in few["apart"] else interpreted(op, False)
    return found, found["apart"][name]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), cases())
def test_numbers_are_those_of_the_reference(op: str, name: str) -> None:
    found, outputs = answer(op, name)
    far = {what: pair for what, pair in outputs.items() if not pair[0] <= pair[1]}
    assert not far, f"HEADWAY_TEST_SEED={found['seed']}: apart, and tolerance"


@pytest.mark.slow
@pytest.mark.parametrize(("op", "name"), cases())
def test_loops_move_and_multiply_what_their_formulas_say(op: str, name: str) -> None:
    found, _ = answer(op, name)
    counted, expected = found["counted"][name]
    assert counted == expected, "bytes read, bytes written, FLOPs of products"


@pytest.mark.matrix
@pytest.mark.parametrize("op", OPS)
def test_defaults_compile_for_gpus_that_are_not_here(op: str) -> None:
    rows = compiled(op, most=1)
    assert {row["target"] for row in rows} == set(TARGETS)
    assert [fault for row in rows for fault in broken(row)] == []
    assert table(rows) in PAGE.read_text(encoding="utf-8"), "docs/kernels.md is old: run `make kernels`"


@pytest.mark.long
@pytest.mark.parametrize("op", OPS)
def test_every_configuration_compiles(op: str) -> None:
    assert [fault for row in compiled(op) for fault in broken(row)] == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in names_of(op)])
def test_a_gpu_gives_what_the_reference_gives(op: str, name: str) -> None:
    module = importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")
    for what, result in module.CASES[name](torch.device("cuda")).items():
        apart, tolerance = deviation(*result)
        assert apart <= tolerance, what
