"""Triton kernels and what there is beside them: the same computation, forward and backward, on the same operands.

RACES: op -> names of sizes -> function that makes a race on a device. All are of bf16 but the optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from headway.kernels import random, rotary
from headway.kernels.attention import flex, scopes
from headway.kernels.attention.masks import Mask
from headway.kernels.cross_entropy import linear_cross_entropy
from headway.kernels.triton import block_sparse, cross_entropy, grouped
from headway.kernels.triton import rotary as turning
from headway.kernels.triton.adamw import adamw
from headway.kernels.triton.attention import attention
from headway.kernels.triton.dropout import dropout
from headway.kernels.triton.glu import glu
from headway.kernels.triton.norm import norm
from headway.kernels.triton.workloads import below, normal
from headway.kernels.triton.workloads.adamw import HOW, MODEL, lists

Step = Callable[[], Sequence[Tensor]]
Make = Callable[[torch.device], "Race"]
EPS = 1e-5


class Race(NamedTuple):
    """Attributes:
    ours: computes, and gives what it has found.
    theirs: the same of others, by name.
    alike: whether all must find the same; not of what is drawn.
    """

    ours: Step
    theirs: Mapping[str, Step]
    alike: bool = True


def trained(compute: Callable[..., Any], *inputs: Tensor) -> Step:
    """Forward, and backward for all inputs; gives outputs and gradients. Outputs are their own slopes."""

    def step() -> Sequence[Tensor]:
        found = compute(*inputs)
        outputs = found if isinstance(found, tuple) else (found,)
        return [*outputs, *torch.autograd.grad(outputs, inputs, [x.detach() for x in outputs])]

    return step


def plain(compute: Callable[..., Any], *inputs: Tensor) -> dict[str, Step]:
    """PyTorch's operators one by one, and as it compiles them."""
    fused = torch.compile(compute, dynamic=False)
    return {"eager": trained(compute, *inputs), "torch.compile": trained(fused, *inputs)}


# -- races ---------------------------------------------------------------------------------------------------------


def attention_race(
    heads: int, key_heads: int, length: int, dim: int, batch: int, device: torch.device
) -> Race:
    """Causal attention."""
    q, k, v = (normal(device, batch, count, length, dim) for count in (heads, key_heads, key_heads))
    grouped_heads = heads != key_heads
    theirs = {
        "SDPA": partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=grouped_heads),
        "FlexAttention": lambda q, k, v: flex.attention(q, k, v, Mask(), dim**-0.5),
    }
    if find_spec("flash_attn"):
        theirs["FlashAttention"] = _flash
    ours = trained(lambda q, k, v: attention(q, k, v, Mask()), q, k, v)
    return Race(ours, {name: trained(compute, q, k, v) for name, compute in theirs.items()})


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from flash_attn import flash_attn_func

    found: Tensor = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=True)
    return found.transpose(1, 2)


def sparse_race(scope: scopes.Scope, length: int, dim: int, device: torch.device) -> Race:
    """Causal attention of a scope, 8 heads over 2 of keys."""
    q, k, v = (normal(device, 1, count, length, dim) for count in (8, 2, 2))
    mask = Mask(scope=scope)
    theirs = trained(lambda q, k, v: flex.attention(q, k, v, mask, dim**-0.5), q, k, v)
    ours = trained(lambda q, k, v: block_sparse.attention(q, k, v, mask), q, k, v)
    return Race(ours, {"FlexAttention": theirs})


def norm_race(rows: int, width: int, centred: bool, device: torch.device) -> Race:
    """A residual sum and its norm."""
    x, residual, weight, bias = (normal(device, *shape) for shape in [(rows, width)] * 2 + [(width,)] * 2)
    shift = [bias] if centred else []

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        return norm(x, weight, bias, eps=EPS, centred=centred, residual=residual)

    def theirs(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        u = x + residual
        if centred:
            return F.layer_norm(u, (width,), weight, bias, EPS), u
        return F.rms_norm(u, (width,), weight, EPS), u

    inputs = x, residual, weight, *shift
    return Race(trained(ours, *inputs), plain(theirs, *inputs))


def cross_entropy_race(rows: int, width: int, vocab: int, device: torch.device) -> Race:
    """Head and loss."""
    hidden, labels = normal(device, rows, width), below(device, vocab, rows)
    weight = (normal(device, vocab, width).detach() * width**-0.5).requires_grad_()
    ours = lambda h, w: linear_cross_entropy(h, w, labels, compute=cross_entropy.row_loss).total  # noqa: E731
    theirs = lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels, reduction="sum")  # noqa: E731
    return Race(trained(ours, hidden, weight), plain(theirs, hidden, weight))


def adamw_race(sizes: Sequence[int], device: torch.device) -> Race:
    """A step, of gradients in fp32: PyTorch's takes one dtype."""
    ours = lists(device, sizes)
    del ours["copies"]
    ours["grads"] = [x.float() for x in ours["grads"]]
    theirs = {name: [x.clone() for x in tensors] for name, tensors in ours.items()}

    def our_step() -> Sequence[Tensor]:
        adamw(**ours, **HOW)
        return ours["params"]

    def their_step() -> Sequence[Tensor]:
        torch._fused_adamw_(*_fused(theirs), amsgrad=False, maximize=False, **HOW)
        return theirs["params"]

    return Race(our_step, {"torch fused": their_step})


def _fused(given: Mapping[str, list[Tensor]]) -> list[list[Tensor]]:
    names = "params", "grads", "exp_avgs", "exp_avg_sqs"
    return [*(given[name] for name in names), [], given["state_steps"]]


def grouped_race(rows: int, inner: int, outer: int, groups: int, device: torch.device) -> Race:
    """Products of equally large groups."""
    x = normal(device, rows, inner)
    w = (normal(device, groups, outer, inner).detach() * inner**-0.5).requires_grad_()
    ends = torch.arange(1, groups + 1, device=device) * (rows // groups)
    offsets = ends.int()
    ours = trained(lambda x, w: grouped.linear(x, w, None, ends), x, w)
    return Race(ours, {"grouped_mm": trained(lambda x, w: F.grouped_mm(x, w.mT, offs=offsets), x, w)})


def glu_race(rows: int, width: int, device: torch.device) -> Race:
    """SwiGLU."""
    gate, up = normal(device, rows, width), normal(device, rows, width)
    theirs = plain(lambda gate, up: F.silu(gate) * up, gate, up)
    return Race(trained(lambda gate, up: glu(gate, up, "swiglu"), gate, up), theirs)


def rotary_race(batch: int, length: int, heads: int, key_heads: int, dim: int, device: torch.device) -> Race:
    """Queries and keys of [B, S, H, D] in memory."""
    q, k = (normal(device, batch, length, count, dim) for count in (heads, key_heads))
    turn = rotary.rotation(torch.arange(length, device=device), dim, 10_000.0)

    def ours(q: Tensor, k: Tensor) -> Any:
        return turning.rotate(q.transpose(1, 2), k.transpose(1, 2), turn)

    def theirs(q: Tensor, k: Tensor) -> Any:
        return rotary.rotate(q.transpose(1, 2), turn), rotary.rotate(k.transpose(1, 2), turn)

    return Race(trained(ours, q, k), plain(theirs, q, k))


def dropout_race(batch: int, places: int, width: int, device: torch.device) -> Race:
    """A bias, dropout and a residual; PyTorch's own random numbers."""
    x, residual, bias = (normal(device, *shape) for shape in [(batch, places, width)] * 2 + [(width,)])
    key, slot, position = (below(device, 1 << 32, *shape) for shape in ((), (batch, 1), (1, places)))

    def ours(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return dropout(x, 0.1, key, (slot, position, 0), residual=residual, bias=bias)

    theirs = plain(lambda x, residual, bias: residual + F.dropout(x + bias, 0.1), x, residual, bias)
    return Race(trained(ours, x, residual, bias), theirs, alike=False)


RACES: dict[str, dict[str, Make]] = {
    "attention": {
        "8 x 12 x 1,024 x 64, causal": partial(attention_race, 12, 12, 1024, 64, 8),
        "4 x 32 over 8 x 4,096 x 128, causal": partial(attention_race, 32, 8, 4096, 128, 4),
        "1 x 32 over 8 x 16,384 x 128, causal": partial(attention_race, 32, 8, 16384, 128, 1),
    },
    "block_sparse": {
        "longformer, 8,192 x 64": partial(sparse_race, scopes.Global(512, 64, True), 8192, 64),
        "bigbird, 8,192 x 128": partial(
            sparse_race, scopes.BigBird(64, 2, 3, random.key(0, "bigbird")), 8192, 128
        ),
    },
    "norm": {
        "8,192 x 768, LayerNorm": partial(norm_race, 8192, 768, True),
        "8,192 x 4,096, RMSNorm": partial(norm_race, 8192, 4096, False),
        "16,384 x 8,192, RMSNorm": partial(norm_race, 16384, 8192, False),
    },
    "cross_entropy": {
        "8,192 x 768 x 50,304": partial(cross_entropy_race, 8192, 768, 50304),
        "8,192 x 4,096 x 131,072": partial(cross_entropy_race, 8192, 4096, 131_072),
    },
    "adamw": {
        "148 tensors, 124 million": partial(adamw_race, MODEL),
        "one of 1 billion": partial(adamw_race, (1 << 30,)),
    },
    "grouped": {
        "16,384 x 1,024 x 4,096, 8 groups": partial(grouped_race, 16384, 1024, 4096, 8),
        "32,768 x 4,096 x 14,336, 8 groups": partial(grouped_race, 32768, 4096, 14336, 8),
    },
    "glu": {
        "8,192 x 3,072": partial(glu_race, 8192, 3072),
        "16,384 x 11,008": partial(glu_race, 16384, 11008),
    },
    "rotary": {
        "32 x 1,024 x 12 of 64": partial(rotary_race, 32, 1024, 12, 12, 64),
        "4 x 4,096 x 32 and 8 of 128": partial(rotary_race, 4, 4096, 32, 8, 128),
    },
    "dropout": {
        "16 x 512 x 768": partial(dropout_race, 16, 512, 768),
        "4 x 2,048 x 4,096": partial(dropout_race, 4, 2048, 4096),
    },
}
