"""Triton's kernels of map distillation: interpreted beside autograd over whole maps, compiled for GPUs that are not
here, and on one that is."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.tests.kernels.triton.cases import (
    CASES,
    HIDDEN,
    LOSSES,
    Case,
    compute,
    expected,
    largest_score,
    losses_of,
)


def program(name: str, *arguments: str, **environment: str) -> Any:
    """What a program of this folder prints."""
    command = [sys.executable, "-m", f"headway.tests.kernels.triton.{name}", *arguments]
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found = json.loads(done.stdout)
    if found is None:
        pytest.skip("Triton is neither installed nor among the oracles")
    return found


FEW = (HIDDEN, "averaged teacher heads")
"""Cases that are always interpreted."""


@cache
def interpreted(few: bool = True) -> dict[str, Any]:
    chosen = [name for name in CASES if (name in FEW) == few]
    return program("interpreted", *chosen, TRITON_INTERPRET="1")


def marked() -> Iterator[Any]:
    for case in CASES:
        for loss in losses_of(case):
            yield pytest.param(case, loss, marks=() if case in FEW else pytest.mark.matrix)


@pytest.mark.slow
@pytest.mark.parametrize(("case", "loss"), marked())
def test_sums_and_gradients_are_those_of_whole_maps(case: str, loss: str) -> None:
    """A score is a sum of 32 products, of absolute values A in all at most: rounded after each, to 2^-24 of it, it is
    off by sqrt(32) 2^-24 A, as errors are of either sign. Weights are off by as much, relatively, and so are their
    logarithms; sums, and gradients beside the largest, by some multiple: four. fp16 rounds gradients by 2^-11.
    """
    found = interpreted(case in FEW)
    tolerance = 4 * 32**0.5 * 2**-24 * found["score"][case]
    sums, *gradients = found["apart"][f"{case}: {loss}"]
    assert sums <= tolerance
    assert max(gradients) <= tolerance + (2**-11 if case == "fp16" else 0)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_rows_that_see_nothing_give_exactly_nothing(loss: str) -> None:
    assert interpreted()["hidden"][loss] == 0


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(loss: str) -> None:
    """Both models' scores are the same numbers; logarithms and powers of theirs are rounded to 2^-24, in 20 rows."""
    assert interpreted()["twins"][loss] <= 20 * 2**-24


@pytest.mark.slow
def test_refusals_name_the_operand_and_the_rule() -> None:
    found = interpreted()["refusals"]
    assert "takes fp32, bf16 and fp16, and q_teacher is torch.float64" in found["fp64"]
    assert "interpreter computes bf16 wrongly" in found["bf16"]
    assert "widths up to 512" in found["wide"]


TARGETS = "sm_80", "sm_90", "gfx942"


@pytest.mark.parametrize(
    "dim", [pytest.param(128, marks=pytest.mark.matrix), pytest.param(64, marks=pytest.mark.long)]
)
def test_kernels_compile_for_gpus_and_fit(tmp_path: Path, dim: int) -> None:
    """bf16 for the A100, the H100 and AMD's MI300, without one: at most four registers, 16 bytes, are spilled, and
    shared memory is less than the 99 KiB of all GPUs since sm_80 (64 KiB on the MI300)."""
    found = program("compiled", "plain", str(dim), *TARGETS, TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 6
    for targets in found.values():
        for target in TARGETS:
            assert targets[target]["spilled"] <= (16 if target == "sm_80" else 0)
            assert targets[target]["shared"] <= (64 if target == "gfx942" else 99) * 1024


@pytest.mark.matrix
def test_kernels_compile_for_every_kind_of_mask_and_bias_at_once(tmp_path: Path) -> None:
    found = program("compiled", "everything", "64", "sm_90", TRITON_CACHE_DIR=str(tmp_path))
    assert len(found) == 5
    assert all(targets["sm_90"]["shared"] <= 99 * 1024 for targets in found.values())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", CASES)
def test_a_gpu_gives_what_the_usual_way_gives(name: str, loss: str, dtype: torch.dtype) -> None:
    """As above. Products of bf16 are exact in fp32, but the gradient of a score is rounded to their dtype before its
    product, and the result again: 2^-9 each; fp16, and tf32 in its place, 2^-11."""
    from headway.kernels.triton.map_distillation import sums

    case = in_dtype(CASES[name](), dtype)
    found, wanted = compute(sums, there(case), loss), expected(case, loss)
    tolerance = 4 * 32**0.5 * 2**-24 * largest_score(case)
    rounding = {torch.float32: 0, torch.bfloat16: 2**-9, torch.float16: 2**-11}[dtype]
    assert (found.sums.cpu() - wanted.sums).abs().max() <= tolerance * wanted.sums.abs().max()
    for got, want in zip(found.gradients, wanted.gradients, strict=True):
        assert (got.cpu() - want).abs().max() <= (tolerance + 2 * rounding) * want.abs().max()


def in_dtype(case: Case, dtype: torch.dtype) -> Case:
    """A case whose queries and keys are rounded."""
    models = (model._replace(q=model.q.to(dtype), k=model.k.to(dtype)) for model in case[:2])
    return Case(*models, case.seen)


def there(x: Any) -> Any:
    """A description with all its tensors on the GPU."""
    if isinstance(x, tuple):
        return type(x)(*(there(each) for each in x))
    return x.cuda() if isinstance(x, torch.Tensor) else x
