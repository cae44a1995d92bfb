"""What the kernels of rows of logits refuse, before they are launched."""

import pytest
import torch

from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")
LABELS = torch.zeros(4, dtype=torch.int64)


def test_logits_of_64_bits_are_refused() -> None:
    from headway.kernels.triton.cross_entropy import row_loss

    with pytest.raises(ValueError, match=r"logits of torch\.float64: must be one of torch\.float32"):
        row_loss(torch.zeros(4, 8, dtype=torch.float64), LABELS, 0.0, True)


def test_words_that_are_not_side_by_side_are_refused() -> None:
    from headway.kernels.triton.cross_entropy import own_shares

    with pytest.raises(ValueError, match=r"logits of strides \(1, 4\): the last must be 1"):
        own_shares(torch.zeros(8, 4).T, LABELS, 0)


def test_a_teacher_of_64_bits_is_refused() -> None:
    from headway.kernels.soft_targets import Soft
    from headway.kernels.triton.soft_targets import soft_row_loss

    student, teacher = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"teacher's logits of torch\.float64: must be one of"):
        soft_row_loss(student, teacher, torch.ones(4, dtype=torch.bool), Soft(), True)
