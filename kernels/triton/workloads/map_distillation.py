"""A loss; samples x heads, over heads of keys, x tokens x head dimension, of both models alike but for the last."""

from __future__ import annotations

from typing import NamedTuple

import torch

from headway.kernels.attention.masks import Mask
from headway.kernels.attention.scopes import Window
from headway.kernels.maps.operands import Scores, Seen
from headway.kernels.triton.map_distillation import sums
from headway.kernels.triton.workloads import normal


class Shape(NamedTuple):
    """Samples, tokens; of the teacher and of the student heads of queries and of keys, and head dimension."""

    batch: int
    length: int
    teacher: tuple[int, int, int]
    student: tuple[int, int, int]


def call(
    device: torch.device,
    loss: str,
    shape: Shape,
    mask: Mask,
    *,
    learned: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Forward and backward; `learned`: the student's scores have a bias that learns."""
    (q_t, k_t), (q, k) = (
        tuple(normal(device, shape.batch, n, shape.length, dim, dtype=dtype) for n in heads)
        for *heads, dim in (shape.teacher, shape.student)
    )
    bias = None
    if learned:
        bias = normal(device, shape.student[0], shape.length, shape.length, dtype=torch.float32)
    teacher = Scores(q_t.detach(), k_t.detach(), shape.teacher[2] ** -0.5)
    found = sums(teacher, Scores(q, k, shape.student[2] ** -0.5, bias), loss, Seen(mask), None)
    inputs = [x for x in (q, k, bias) if x is not None]
    torch.autograd.grad(found, inputs, torch.empty_like(found))


SIZES = {
    "kl, 8 x 12 x 1,024 x 64, learned bias": lambda device: call(
        device, "kl", Shape(8, 1024, (12, 12, 64), (12, 12, 64)), Mask(False), learned=True
    ),
    "js, 4 x 32 over 8 x 4,096 x 128, causal": lambda device: call(
        device, "js", Shape(4, 4096, (32, 8, 128), (32, 8, 128)), Mask(), learned=False
    ),
    "mse, 2 x 8 over 4 x 4,096 x 256, of 16 teacher heads, window": lambda device: call(
        device, "mse", Shape(2, 4096, (16, 8, 256), (8, 4, 256)), Mask(scope=Window(1024)), learned=True
    ),
}
