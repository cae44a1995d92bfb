"""Every Triton kernel, without a GPU: its numbers and what it moves, interpreted; with one, its numbers there."""

import importlib
import itertools
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
from headway.tests.kernels.triton.table import broken, compiled, digests, table, written

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


OFTEN = [pytest.mark.matrix, pytest.mark.xdist_group("kernels")]


def proof_of(op: str) -> Any:
    return importlib.import_module(f"headway.tests.kernels.triton.proofs.{op}")


def tiers(op: str) -> tuple[list[str], list[str], list[str]]:
    """Names of cases: the first, which is always run; those of `make matrix`; the others, of `make long`."""
    first, *others = proof_of(op).CASES
    often = list(getattr(proof_of(op), "OFTEN", ()))
    return [first], often, [name for name in others if name not in often]


def cases() -> Iterator[Any]:
    """Op and name of all cases."""
    for op in OPS if find_triton() else ():
        for names, marks in zip(tiers(op), ([], OFTEN, [pytest.mark.long]), strict=True):
            yield from (pytest.param(op, name, marks=marks) for name in names)


@cache
def interpreted(seed: str, *asked: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "headway.tests.kernels.triton.interpret", *asked]
    environment = {"HEADWAY_TEST_SEED": seed} | os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def answer(op: str, name: str) -> tuple[int, dict[str, Any]]:
    """The seed and what was computed of a case. One process computes all that are always run, of the same operands
    every time; another those of `make matrix`, and one for every op the others, of fresh ones."""
    tier = next(number for number, names in enumerate(tiers(op)) if name in names)
    asked = ((each, other) for each in (OPS if tier < 2 else (op,)) for other in tiers(each)[tier])
    found = interpreted("" if tier else "0", *itertools.chain(*asked))
    return found["seed"], next(x for x in found["cases"] if (x["op"], x["name"]) == (op, name))


@pytest.mark.parametrize(("op", "name"), cases())
def test_numbers_are_those_of_the_reference(op: str, name: str) -> None:
    seed, found = answer(op, name)
    far = {what: pair for what, pair in found["apart"].items() if not pair[0] <= pair[1]}
    assert not far, f"HEADWAY_TEST_SEED={seed}: apart, and tolerance"


@pytest.mark.parametrize(("op", "name"), cases())
def test_loops_move_and_multiply_what_their_formulas_say(op: str, name: str) -> None:
    _, found = answer(op, name)
    assert found["counted"] == found["expected"], "bytes read, bytes written, FLOPs of products"


def test_tables_are_of_these_kernels() -> None:
    tables = written()
    of = digests(*tables)
    old = [op for op, table in tables.items() if table.digest != of[op]]
    assert not old, (
        f"docs/kernels.md has tables of these as they were: run `make kernels OPS='{' '.join(old)}'`"
    )


@pytest.mark.long
@pytest.mark.parametrize("op", written())
def test_every_configuration_compiles_for_every_gpu(op: str) -> None:
    rows = compiled(op)
    assert {row["target"] for row in rows} == set(TARGETS)
    assert [fault for row in rows for fault in broken(row)] == []
    assert table(rows) == written()[op].text, f"docs/kernels.md is old: run `make kernels OPS={op}`"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("op", "name"), [case.values for case in cases()]
)  # all of them, also those marked long
def test_a_gpu_gives_what_the_reference_gives(op: str, name: str) -> None:
    for what, result in proof_of(op).CASES[name](torch.device("cuda")).items():
        apart, tolerance = deviation(*result)
        assert apart <= tolerance, what
