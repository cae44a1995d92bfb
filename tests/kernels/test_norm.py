"""Norms against fp64 formulas."""

import pytest
import torch

from headway.kernels import norm


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_match_their_formulas_and_keep_wide_statistics(dtype):
    x = (torch.randn(5, 7, 33) * 3 + 100).to(dtype)  # a large mean: bf16 statistics would be off by percents
    weight, bias, exact = torch.randn(33, dtype=dtype), torch.randn(33, dtype=dtype), x.double()
    centred = exact - exact.mean(-1, keepdim=True)
    layer = (
        centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double() + bias.double()
    )
    rms = exact / (exact.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    # fp32: cancellation of the mean (100 / 3) times 33 roundings of 6e-8; the inputs are exact in every dtype.
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(norm.layer_norm(x, weight, bias, 1e-5).double(), layer, **tolerance)
    torch.testing.assert_close(norm.rms_norm(x, weight, 1e-5).double(), rms, **tolerance)
    assert norm.rms_norm(x, weight, 1e-5).dtype == torch.promote_types(dtype, torch.float32)
