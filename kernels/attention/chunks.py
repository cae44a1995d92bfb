"""Any composed attention in blocks of queries: memory grows with the length, and with what a scope leaves to be seen.

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
from headway.kernels.attention.masks import Mask, lower
from headway.kernels.attention.scores import Extras

if TYPE_CHECKING:
    from headway.kernels.attention.compose import Form

ELEMENTS = 1 << 22
"""Scores of a block at most, so that its temporaries stay near the caches."""


class Task(NamedTuple):
    """What an attention is about, beside its operands. `x`: settings and own tensors; `names`: of the latter;
    `lengths`: queries and keys."""

    form: Form
    mask: Mask
    dropout: WeightDropout | None
    scale: float
    x: Extras
    names: tuple[str, ...]
    lengths: tuple[int, int]


@torch.compiler.disable
def attention(
    form: Form,
    q_BHQD: Tensor,
    k_BKSD: Tensor,
    v_BKSD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None,
    scale: float,
    bias_HQK: Tensor | None,
    x: Extras,
) -> Tensor:
    """Attention of prepared operands, [B, H, Q, D]; see `Form.reference`."""
    names = tuple(name for name, value in x.items() if isinstance(value, Tensor))
    task = Task(form, mask, dropout, scale, x, names, (q_BHQD.shape[2], k_BKSD.shape[2]))
    out: Tensor = _Chunks.apply(task, q_BHQD, k_BKSD, v_BKSD, bias_HQK, *(x[name] for name in names))
    return out


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, task: Task, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *own: Tensor
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, bias, *own)
        ctx.task = task
        parts = _parts(task, q, k)
        return torch.cat([_attend(task, part, _operands(part, q, k, v, bias), own) for part in parts], 2)

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, bias, *own = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)
        total = [None if t is None else torch.zeros_like(t, dtype=wide) for t in (k, v, bias, *own)]
        dqs, task = [], ctx.task
        for part in _parts(task, q, k):
            given = [*_operands(part, q, k, v, bias), *own]
            wanted = [i for i, t in enumerate(given) if t is not None and t.is_floating_point()]
            with torch.enable_grad():
                given = [t.detach().requires_grad_() if i in wanted else t for i, t in enumerate(given)]
                out = _attend(task, part, given[:4], given[4:])
                found = torch.autograd.grad(
                    out, [given[i] for i in wanted], d_out[:, :, part.queries], allow_unused=True
                )
            for i, gradient in zip(wanted, found, strict=True):
                if i == 0:
                    dqs.append(gradient)
                elif gradient is not None:
                    _add(part, total[i - 1], gradient, i)
        dk, dv, d_bias, *d_own = (
            None if t is None or like is None else t.to(like.dtype)
            for t, like in zip(total, (k, v, bias, *own), strict=True)
        )
        return None, torch.cat(dqs, 2), dk, dv, d_bias, *d_own


class Part(NamedTuple):
    """A block of queries and the runs of keys that it may see; `numbers` are the keys' own, if
    there are several runs."""

    queries: slice
    runs: list[slice]
    numbers: Tensor | None

    @property
    def keys(self) -> Any:
        return self.runs[0] if self.numbers is None else self.numbers


def _parts(task: Task, q: Tensor, k: Tensor) -> Iterator[Part]:
    length, keys = q.shape[2], k.shape[2]
    width = q.shape[0] * q.shape[1] * (1 if task.form.score.product else q.shape[3])
    rows = min(task.mask.rows, max(16, ELEMENTS // (width * keys) // 16 * 16))
    for start in range(0, length, rows):
        queries = slice(start, min(length, start + rows))
        runs = task.mask.runs_of(queries, keys)
        index = None
        if len(runs) > 1:
            index = torch.cat([torch.arange(run.start, run.stop, device=q.device) for run in runs])
        yield Part(queries, runs, index)


def _operands(part: Part, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Any:
    return (
        q[:, :, part.queries],
        *(t[:, :, part.keys] for t in (k, v)),
        None if bias is None else bias[:, part.queries][:, :, part.keys],
    )


def _attend(task: Task, part: Part, operands: Any, own: Any) -> Tensor:
    """The specification, of a block."""
    from headway.kernels.attention.compose import weigh

    q, k, v, bias = operands
    form, mask = task.form, task.mask
    x = {**task.x, **dict(zip(task.names, own, strict=True))}
    scores = form.score.compute(q, k, task.scale, x)
    if bias is not None:
        scores = scores + bias
    seen = lower(mask, *task.lengths, q.device, part.queries, part.keys)
    weights = form.score.mix(
        weigh(form.weighting, scores, seen, None if form.own is None else x[form.own]), x
    )
    if task.dropout is not None:
        kept = task.dropout.kept(weights.shape[1], part.queries, slice(0, part.runs[-1].stop))[..., part.keys]
        weights = torch.where(kept, weights * random.kept_scale(task.dropout.p), 0)
    return weights.to(v.dtype) @ per_query_head(v, weights)


def _add(part: Part, total: Any, gradient: Tensor, place: int) -> None:
    """Add a block's gradient of keys or values (1, 2), of the bias (3), or of an own parameter."""
    if place > 3:
        total += gradient
    elif place == 3:
        rows = total[:, part.queries]
        rows[:, :, part.keys] = rows[:, :, part.keys] + gradient
    elif part.numbers is None:
        total[:, :, part.runs[0]] += gradient
    else:
        total.index_add_(2, part.numbers, gradient.to(total.dtype))
