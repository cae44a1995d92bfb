"""Optimizers' kernels beside their numbers: how few launches, which blocks, and what they refuse."""

import math

import pytest
import torch

from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")

HOW = {"lr": 0.1, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.1, "eps": 1e-8}


def lists(sizes, device="meta", **dtypes):
    names = {"params": torch.float32, "grads": torch.bfloat16} | dict.fromkeys(
        ("exp_avgs", "exp_avg_sqs", "state_steps"), torch.float32
    )
    return {
        name: [
            torch.ones(n, dtype=dtype, device=device)
            for n in (sizes if name != "state_steps" else [1] * len(sizes))
        ]
        for name, dtype in (names | dtypes).items()
    }


@pytest.mark.parametrize(("name", "count"), [("adamw", 1), ("lamb", 3)])
def test_a_step_of_many_tensors_is_few_launches(name, count):
    from headway.kernels.triton import adamw, lamb
    from headway.tests.kernels.triton.launches import recorded

    step = {"adamw": adamw.adamw, "lamb": lamb.lamb}[name]
    with recorded() as launches:
        step(**lists([5000] * 700 + [1, 0]), **HOW)
    assert len(launches) == count


def test_nothing_is_launched_for_no_elements():
    from headway.kernels.triton.adamw import adamw
    from headway.kernels.triton.lamb import lamb
    from headway.tests.kernels.triton.launches import recorded

    with recorded() as launches:
        for step in (adamw, lamb):
            step(**lists([]), **HOW)
            step(**lists([0, 0]), **HOW)
    assert not launches


def test_blocks_cover_every_tensor_once_and_rows_point_to_them():
    from headway.kernels.triton.tensor_table import table_of

    tensors = [torch.zeros(n) for n in (10, 0, 4, 1, 9)]
    table = table_of({"x": tensors}, 4)
    assert table.blocks.tolist() == [[0, 0], [0, 1], [0, 2], [2, 0], [3, 0], [4, 0], [4, 1], [4, 2]]
    assert table.rows.tolist() == [
        [x.data_ptr(), x.numel(), first] for x, first in zip(tensors, (0, 3, 3, 4, 5), strict=True)
    ]
    assert table.aligned == all(x.data_ptr() % 16 == 0 for x in tensors)
    assert not table_of({"x": [torch.zeros(9)[1:]]}, 4).aligned


def test_debiasing_is_right_to_the_last_digit_from_the_first_step_on():
    from headway.kernels.triton.tensor_table import corrections

    steps = (1, 2, 1000, 10_000_000)
    found = corrections([torch.tensor(float(t)) for t in steps], 0.9, 0.999, [torch.ones(3)] * len(steps))
    wanted = [[1 - 0.9**t, math.sqrt(1 - 0.999**t)] for t in steps]
    assert torch.equal(found, torch.tensor(wanted, dtype=torch.float64).float())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"state_steps": [torch.ones(1)]}, r"state_steps: of shapes \[\(1,\)\].* 2 params"),
        ({"grads": [torch.ones(3)]}, r"grads: 1 tensors beside 2 of params"),
        ({"grads": [torch.ones(3), torch.ones(5)]}, r"grads\[1\]: of shape \(5,\)"),
        ({"exp_avgs": [torch.ones(3), torch.ones(4).bfloat16()]}, r"exp_avgs\[1\]: torch.bfloat16"),
        ({"params": [torch.ones(3).double(), torch.ones(4).double()]}, r"params\[0\]: torch.float64"),
        ({"exp_avg_sqs": [torch.ones(6)[::2], torch.ones(4)]}, r"exp_avg_sqs\[0\]: strides \(2,\)"),
        ({"exp_avgs": [torch.ones(3), torch.ones(4, device="meta")]}, r"exp_avgs\[1\].*meta"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(changed, message):
    from headway.kernels.triton.adamw import adamw

    with pytest.raises(ValueError, match=message):
        adamw(**(lists([3, 4], "cpu") | changed), **HOW)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 5, 4), r"shape \(2, 5, 4\).*transpose"),
        (torch.zeros(4, 5), r"shape \(4, 5\)"),
        (torch.zeros(1, 4, 5, dtype=torch.float64), "torch.float64"),
    ],
)
def test_matrices_that_cannot_be_orthogonalised_are_refused(x, message):
    from headway.kernels.triton.muon import orthogonalise

    with pytest.raises(ValueError, match=message):
        orthogonalise(x, (3.0, -4.0, 2.0))
