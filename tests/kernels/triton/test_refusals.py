"""What Triton's operators of rows and groups refuse, and where they put pairs; no kernel is launched."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch

from headway.kernels.rotary import Rotation
from headway.tests.kernels.triton.finding import find_triton

if not find_triton():
    pytest.skip("Triton is neither installed nor among the oracles", allow_module_level=True)

from headway.kernels.triton import dropout, experts, glu, grouped, rotary

ZEROS = torch.zeros


def _rotate(dim: int = 8, places: int = 5, batch: int = 2, turned: int = 5) -> None:
    turn = Rotation(ZEROS(turned, 4), ZEROS(turned, 4))
    rotary.rotate(ZEROS(2, 3, 5, 8), ZEROS(batch, 1, places, dim), turn)


def _dropout(p: float = 0.1, residual: int = 8, third: torch.Tensor | int = 0) -> None:
    key, slot, position = (ZEROS(shape, dtype=torch.int64) for shape in ((), (2, 1), (1, 5)))
    dropout.dropout(ZEROS(2, 5, 8), p, key, (slot, position, third), residual=ZEROS(2, 5, residual))


def _linear(dtype: torch.dtype = torch.float32, width: int = 8) -> None:
    grouped.linear(ZEROS(6, 8, dtype=dtype), ZEROS(2, 3, width), None, torch.tensor([3, 6]))


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "another head dimension": (lambda: _rotate(dim=16), "k has head dimension 16; this turn is of 8"),
    "more places than angles": (lambda: _rotate(places=6), "k has 6 places; this turn has 5"),
    "two batches": (lambda: _rotate(batch=3), "q has batch 2, k 3"),
    "an unknown gate": (
        lambda: glu.glu(ZEROS(2, 8), ZEROS(2, 8), "silu"),
        "'silu': one of swiglu, geglu, geglu_tanh",
    ),
    "a gate and another up": (lambda: glu.glu(ZEROS(2, 8), ZEROS(2, 9), "swiglu"), r"up has shape \(2, 9\)"),
    "an unknown activation": (lambda: glu.activate(ZEROS(2, 8), "swiglu"), "'swiglu': one of gelu"),
    "everything dropped": (lambda: _dropout(p=1.0), "p 1.0: below 1"),
    "another residual": (lambda: _dropout(residual=9), r"residual \[2, 5, 9\]"),
    "three tensors": (lambda: _dropout(third=ZEROS(1, 1)), "two tensors and a number"),
    "a product in fp64": (lambda: _linear(torch.float64), "x is of torch.float64: fp32, bf16 or fp16"),
    "other widths": (lambda: _linear(width=9), "x has width 8, w 9"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    call, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        call()


def test_pairs_stand_in_their_groups_in_order() -> None:
    at = experts.places(torch.tensor([2, 0, 2, 3, 0, 2]), experts=3, multiple=4)  # one is not computed
    assert at.row_P.tolist() == [4, 0, 5, at.rows, 1, 6]
    assert at.ends_X.tolist() == [4, 4, 8]
    assert at.rows >= 8


@pytest.mark.parametrize("chosen", [[0] * 6, [0, 1, 2, 0, 1, 2], [2, 2, 2, 2, 2, 1]])
def test_rows_suffice_for_any_choice(chosen: list[int]) -> None:
    at = experts.places(torch.tensor(chosen), experts=3, multiple=4)
    assert at.ends_X[-1] <= at.rows


def test_copies_are_in_the_order_of_rows() -> None:
    found = experts.copies(torch.tensor([1, -1, 0, 1, 3, -1, 1]), 4)
    bounds = found.start_N1.tolist()
    rows = [found.row_R[a:b].tolist() for a, b in pairwise(bounds)]
    assert rows == [[2], [0, 3, 6], [], [4]]
