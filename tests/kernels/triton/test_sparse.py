"""What kernels of sparse attention refuse, and by which words."""

import pytest
import torch

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Local, Window
from headway.kernels.attention.weights import SOFTMAX, Sparsemax
from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")


def some(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


Q, K = some(1, 4, 64, 32), some(1, 2, 64, 32)


@pytest.mark.parametrize(
    ("q", "k", "v", "mask", "words"),
    [
        (Q, K, K, Mask(), "mask.scope is None"),
        (Q, K, K, Mask(scope=Window(8), shift=3), "whole sequences"),
        (Q, K, some(1, 2, 64, 16), Mask(scope=Window(8)), r"\(1, 2, 64, 16\)"),
        (Q, some(1, 3, 64, 32), some(1, 3, 64, 32), Mask(scope=Window(8)), "whose heads they divide"),
        (Q.double(), K, K, Mask(scope=Window(8)), "not torch.float64"),
        (*[some(1, 2, 64, 512)] * 3, Mask(scope=Window(8)), "at most 256, not 512"),
    ],
)
def test_block_sparse_refuses(q, k, v, mask, words) -> None:
    from headway.kernels.triton.block_sparse import attention

    with pytest.raises(KernelUnavailable, match=words):
        attention(q, k, v, mask)


@pytest.mark.parametrize(
    ("q", "k", "mask", "weighting", "words"),
    [
        (Q, K, Mask(), SOFTMAX, "not Weighting"),
        (Q, K, Mask(scope=Local(8, 1)), Sparsemax(), "a window or None"),
        (Q, some(1, 2, 40, 32), Mask(), Sparsemax(), "not 64 and 40"),
        (Q, K.half(), Mask(), Sparsemax(), "not torch.float32, torch.float16"),
    ],
)
def test_sparse_weights_refuse(q, k, mask, weighting, words) -> None:
    from headway.kernels.triton.sparse_weights import attention

    with pytest.raises(KernelUnavailable, match=words):
        attention(q, k, k, mask, weighting)


def test_dropout_whose_keys_begin_amid_eight_is_refused() -> None:
    from headway.kernels.attention.dense import WeightDropout
    from headway.kernels.triton.attention_operands import dropped

    drop = WeightDropout(0.1, torch.tensor(1), torch.arange(1), torch.arange(64), first_key=12)
    with pytest.raises(KernelUnavailable, match="multiple of 8, not 12"):
        dropped(drop)
