"""Scores that are no dot products, in blocks of queries: memory grows with the length, and work with what is seen.

A block of queries is given the keys that it may see, gathered if they are not one run, and is computed by the
specification. The backward computes it again.

Shapes: B batch, H query heads, K key/value heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.parts import Part, parts
from headway.kernels.attention.scores import Extras
from headway.kernels.attention.slopes import Bias, Slopes, learned

if TYPE_CHECKING:
    from headway.kernels.attention.compose import Form

ELEMENTS = 1 << 22
"""Scores of a block at most, so that its temporaries stay near the caches."""


class Task(NamedTuple):
    """What an attention is about, beside its operands. `x`: settings and own tensors; `names`: of the latter; `slopes`:
    a bias that is described."""

    form: Form
    mask: Mask
    dropout: WeightDropout | None
    scale: float
    x: Extras
    names: tuple[str, ...]
    slopes: Slopes | None


@torch.compiler.disable
def attention(
    form: Form,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None,
    scale: float,
    bias_HQK: Bias | None,
    x: Extras,
) -> Tensor:
    """Attention of prepared operands, [B, H, Q, D]; see `Form.reference`."""
    names = tuple(name for name, value in x.items() if isinstance(value, Tensor))
    slopes = bias_HQK if isinstance(bias_HQK, Slopes) else None
    task = Task(form, mask, dropout, scale, x, names, slopes)
    out: Tensor = _Chunks.apply(task, q_BHQD, k_BKSD, v_BKSD, learned(bias_HQK), *(x[name] for name in names))
    return out


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, task: Task, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *own: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, *own)
        ctx.task = task
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        for part in _parts(task, q, k):
            out[:, :, part.queries] = _attend(task, part, _operands(part, q, k, v, bias), own)
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        given = ctx.saved_tensors
        wide = torch.promote_types(given[0].dtype, torch.float32)
        total = [None if t is None else torch.zeros_like(t, dtype=wide) for t in given]
        for part in _parts(ctx.task, *given[:2]):
            here = [*_operands(part, *given[:4]), *given[4:]]
            with torch.enable_grad():
                leaves = [None if t is None else t.detach().requires_grad_() for t in here]
                out = _attend(ctx.task, part, leaves[:4], leaves[4:])
                wanted = [t for t in leaves if t is not None]
                found = iter(torch.autograd.grad(out, wanted, d_out[:, :, part.queries]))
            for place, (whole, leaf) in enumerate(zip(total, leaves, strict=True)):
                if whole is not None and leaf is not None:
                    _add(part, whole, next(found), place)
        return None, *(
            None if t is None or like is None else t.to(like.dtype)
            for t, like in zip(total, given, strict=True)
        )


def _parts(task: Task, q: Tensor, k: Tensor) -> Iterator[Part]:
    width = q.shape[0] * q.shape[1] * (1 if task.form.score.product else q.shape[3])
    rows = max(16, ELEMENTS // (width * k.shape[2]) // 16 * 16)
    return parts(task.mask, q.shape[2], k.shape[2], rows)


def _operands(part: Part, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
    some = None if bias is None else part.bias(bias)
    return q[:, :, part.queries], part.take(k, 2), part.take(v, 2), some


def _attend(task: Task, part: Part, operands: Any, own: Any) -> Tensor:
    """The specification, of a block."""
    from headway.kernels.attention.compose import weigh

    (q, k, v, bias), form = operands, task.form
    x = {**task.x, **dict(zip(task.names, own, strict=True))}
    scores = form.score.compute(q, k, task.scale, x)
    if task.slopes is not None:
        bias = part.bias(task.slopes)
    if bias is not None:
        scores = scores + bias
    seen = part.seen(q.device, slice(None))
    weights = form.score.mix(
        weigh(form.weighting, scores, seen, None if form.own is None else x[form.own]), x
    )
    if task.dropout is not None:
        kept = part.kept(task.dropout, slice(None), slice(0, weights.shape[1]))
        weights = torch.where(kept, weights * random.kept_scale(task.dropout.p), 0)
    return weights.to(v.dtype) @ per_query_head(v, weights)


def _add(part: Part, total: Tensor, gradient: Tensor, place: int) -> None:
    """Add a block's gradient of q, k, v, the bias, or (from 4 on) of an own parameter."""
    if place == 0:
        total[:, :, part.queries] += gradient
    elif place < 3:
        part.add(total, gradient, 2)
    elif place == 3:
        part.add(total[:, part.queries], gradient, 2)
    else:
        total += gradient
