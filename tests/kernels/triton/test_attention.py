"""What attention's Triton kernels refuse, and what they are told of documents; their numbers are among the proofs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


def call(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32, mask: Mask | None = None, **x: Any
) -> Any:
    from headway.kernels.triton.attention import attention

    q, k, v = (torch.empty(shape, dtype=dtype, device="meta") for shape in shapes)
    return attention(q, k, v, Mask() if mask is None else mask, **x)


FITTING = (1, 2, 8, 40), (1, 2, 8, 40), (1, 2, 8, 40)


@pytest.mark.parametrize(
    ("shapes", "given", "rule"),
    [
        (
            FITTING,
            {"dtype": torch.float64},
            "takes fp32, bf16 or fp16, the same of all, and q is torch.float64",
        ),
        (((1, 2, 8, 320),) * 3, {}, "heads up to 256 wide, not q of 320"),
    ],
)
def test_kernels_refuse_what_is_not_for_them(shapes: Any, given: Any, rule: str) -> None:
    with pytest.raises(KernelUnavailable, match=rule):
        call(*shapes, **given)


def test_dropout_begins_where_eight_keys_begin() -> None:
    slots, positions = torch.arange(1), torch.arange(8)
    with pytest.raises(KernelUnavailable, match="a first key that is a multiple of 8, not 12"):
        call(*FITTING, dropout=WeightDropout(0.5, torch.tensor(1), slots, positions, 0, 12))


@pytest.mark.parametrize(
    ("shapes", "mask", "rule"),
    [
        (((1, 3, 8, 40), *FITTING[1:]), Mask(), "H a multiple of K"),
        ((FITTING[0], (1, 2, 9, 40), (1, 2, 9, 40)), Mask(), "mask.causal with 8 queries and 9 keys"),
        (FITTING, Mask(split=(16, 16)), "mask.split"),
    ],
)
def test_operands_that_do_not_fit_together_are_wrong(shapes: Any, mask: Mask, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        call(*shapes, mask=mask)


def test_spans_are_the_first_and_the_last_place_of_a_document() -> None:
    from headway.kernels.triton.attention_operands import lowered

    queries, keys = torch.tensor([[5, 0, 0, 9]]), torch.tensor([[0, 5, 0, 5, -1, 5]])
    q, k = torch.empty(1, 1, 4, 16), torch.empty(1, 1, 6, 16)
    spans = lowered(Mask(False, queries, keys), q, k).spans
    assert spans is not None
    assert [x.tolist() for x in spans] == [
        [[1, 0, 0, 6]], [[5, 2, 2, -1]], [[1, 0, 1, 0, 4, 0]], [[2, 0, 2, 0, -1, 0]]
    ]  # fmt: skip
