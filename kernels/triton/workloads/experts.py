"""Tokens x width, and how many experts of how many a token goes to."""

from __future__ import annotations

import torch

from headway.kernels.triton.experts import combine_rows, copies, places, take_rows
from headway.kernels.triton.workloads import below, normal


def _call(device: torch.device, tokens: int, width: int, experts: int, each: int) -> None:
    at = places(below(device, experts, tokens * each), experts, 128)
    token_R = at.of_rows(torch.arange(tokens, device=device).repeat_interleave(each), -1)
    x, weight_R = normal(device, tokens, width), normal(device, at.rows, dtype=torch.float32)
    mine = copies(token_R, tokens)
    y = combine_rows(take_rows(x, token_R, mine), weight_R, token_R, mine)
    torch.autograd.grad(y, [x, weight_R], y)


SIZES = {
    "8,192 x 1,024, 2 of 8": lambda device: _call(device, 8192, 1024, 8, 2),
    "16,384 x 4,096, 2 of 8": lambda device: _call(device, 16384, 4096, 8, 2),
    "16,384 x 2,048, 8 of 128": lambda device: _call(device, 16384, 2048, 128, 8),
}
