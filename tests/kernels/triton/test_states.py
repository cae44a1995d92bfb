"""What kernels of linear attention, gated or not, and of the delta rule refuse; no kernel is launched."""

import pytest
import torch

from headway.kernels.attention.choose import KernelUnavailable
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.tests.kernels.triton.finding import find_triton

pytestmark = pytest.mark.skipif(not find_triton(), reason="Triton is neither installed nor among the oracles")

REFUSED = {
    "not causal": (Mask(False), (torch.float32,) * 3, "causal masks of whole sequences"),
    "a window": (Mask(scope=Window(8)), (torch.float32,) * 3, "causal masks of whole sequences"),
    "fp16": (Mask(), (torch.float16,) * 3, "fp32 or bf16, not .*float16"),
    "two dtypes": (Mask(), (torch.bfloat16, torch.bfloat16, torch.float32), "of one dtype"),
}


@pytest.mark.parametrize("op", ["linear_attention", "gated_linear", "delta_rule"])
@pytest.mark.parametrize("what", REFUSED)
def test_refused(op: str, what: str) -> None:
    from headway.kernels.triton.delta_rule import delta_rule
    from headway.kernels.triton.gated_linear import gated_linear
    from headway.kernels.triton.linear_attention import linear_attention

    mask, dtypes, words = REFUSED[what]
    given = *(torch.zeros(1, 2, 8, 16, dtype=dtype) for dtype in dtypes), mask
    rows = torch.zeros(1, 2, 8)
    call = {
        "linear_attention": lambda: linear_attention(*given),
        "gated_linear": lambda: gated_linear(*given, decay=rows[..., None].expand(1, 2, 8, 16)),
        "delta_rule": lambda: delta_rule(*given, beta_BHS=rows, log_decay_BHS=rows),
    }[op]
    with pytest.raises(KernelUnavailable, match=f"{op} takes .*{words}"):
        call()


def test_delta_rule_refuses_wide_keys() -> None:
    from headway.kernels.triton.delta_rule import delta_rule

    x, rows = torch.zeros(1, 1, 8, 272), torch.zeros(1, 1, 8)
    with pytest.raises(ValueError, match="head dimension 272: at most 256"):
        delta_rule(x, x, x, Mask(), beta_BHS=rows, log_decay_BHS=rows)
