"""Scaled dot products under any weighting and scope, in blocks of queries: memory grows with the length, and work with
what is seen.

The forward keeps a number a row, from which the backward computes the weights again (Dao et al. 2022, algorithm 4).
Where a scope falls into phases, their outputs are merged by their log-sum-exp (Milakov and Gimelshein 2018).

Shapes: B batch, H query heads (in [H, Q, K]: keys), Q queries, S keys, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from headway.kernels import random
from headway.kernels.attention import cpp
from headway.kernels.attention.dense import WeightDropout, per_query_head
from headway.kernels.attention.draw import Draw
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.parts import Part, parts
from headway.kernels.attention.phases import Move, phases
from headway.kernels.attention.slopes import Bias, Slopes, learned
from headway.kernels.attention.weights import SOFTMAX, Weighting

ELEMENTS = 1 << 20
"""Scores that are computed at once: their temporaries stay in a CPU's caches."""


class Task(NamedTuple):
    """What an attention is about, beside its operands. `cap` bounds the scores, if it is not None; `temperature` and
    `draw` are for weightings that draw; `slopes`: a bias that is described; `tiles`: by the C++ kernel."""

    weighting: Weighting
    mask: Mask
    dropout: WeightDropout | None
    scale: float
    cap: float | None = None
    temperature: float = 1.0
    draw: Draw | None = None
    slopes: Slopes | None = None
    tiles: bool = False

    @property
    def free(self) -> bool:
        """Whether nothing but the scope goes by places."""
        return self.dropout is None and self.slopes is None and self.draw is None


class Operands(NamedTuple):
    """q [B, H, Q, D], k [B, H, S, D], v [B, H, S, any], bias [H, Q, S] or None, the weighting's own [H] or None."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    own: Tensor | None

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.q.dtype, torch.float32)


@torch.compiler.disable
def attention(
    task: Task, q_BHQD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, bias_HQK: Bias | None, own_H: Tensor | None
) -> Tensor:
    """[B, H, Q, D] of v's width; see `compose.Form.reference`."""
    k_BHSD, v_BHSD = (per_query_head(x, q_BHQD) for x in (k_BKSD, v_BKSD))
    if isinstance(bias_HQK, Slopes):
        task = task._replace(slopes=bias_HQK)
    out: Tensor = _Rows.apply(task, q_BHQD, k_BHSD, v_BHSD, learned(bias_HQK), own_H)
    return out


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, task: Task, *tensors: Any) -> Tensor:
        operands = Operands(*tensors)
        out, threshold = outputs(task, operands)
        ctx.save_for_backward(*operands, out, threshold)
        ctx.task = task
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        *tensors, out, threshold = ctx.saved_tensors
        return None, *gradients(ctx.task, Operands(*tensors), out, threshold, d_out)


class Piece(NamedTuple):
    """Rows of the batch and heads of a part, computed at once."""

    part: Part
    rows: slice
    heads: slice

    def queries(self, x: Tensor) -> Tensor:
        """What belongs to its queries of [B, H, Q, ...]."""
        return x[self.rows, self.heads, self.part.queries]

    def keys(self, x: Tensor) -> Tensor:
        """What belongs to its keys of [B, H, S, ...]."""
        return self.part.take(x[self.rows, self.heads], 2)

    def pairs(self, bias: Bias) -> Tensor:
        """What belongs to its pairs of [H, Q, S]."""
        return self.part.bias(bias, self.heads)


def pieces(task: Task, x: Operands) -> Iterator[Piece]:
    """All that is to be computed of a phase."""
    b, h, length = x.q.shape[:3]
    for part in parts(task.mask, length, x.k.shape[2]):
        size = (part.queries.stop - part.queries.start) // (part.queries.step or 1) * part.keys
        heads = max(1, min(h, ELEMENTS // max(1, size)))
        rows = max(1, ELEMENTS // max(1, size * h)) if heads == h else 1
        for first in range(0, b, rows):
            for head in range(0, h, heads):
                yield Piece(part, slice(first, min(b, first + rows)), slice(head, min(h, head + heads)))


def _phases(task: Task, x: Operands) -> list[tuple[Task, Move]]:
    """What is computed alone and merged, and how operands come together for it."""
    if not task.weighting.merges:
        return [(task, Move())]
    near = not task.free or x.bias is not None
    found = phases(task.mask, x.q.shape[2], near, 2 if task.tiles else FOLDED)
    if len(found) == 1 and not found[0][1].apart and not task.tiles:
        return [(task, Move())]
    each = []
    for scope, move in found:
        tiles = task.tiles and (move.apart or scope is None or not scope.scattered)
        mask = move.mask(task.mask, scope, x.q)
        each.append((task._replace(mask=mask, tiles=tiles, weighting=SOFTMAX), move))
    return each


FOLDED = 8
"""Steps from which what they leave is folded: fewer are gone through one after the other."""


def _operands(x: Operands, move: Move) -> Operands:
    """Those of a phase; what is apart has no bias."""
    return Operands(move.rows(x.q), move.keys(x.k), move.keys(x.v), x.bias, None)


def outputs(task: Task, x: Operands) -> tuple[Tensor, Tensor]:
    """Output, and every row's threshold [B, H, Q]."""
    each = _phases(task, x)
    if each[0][0] is task:
        out, threshold = _outputs(task, x)
        return out.to(x.v.dtype), _finite(threshold)
    shape = x.q.shape[:3]
    out = torch.zeros(*shape, x.v.shape[-1], dtype=x.wide, device=x.q.device)
    threshold = torch.full(shape, -torch.inf, dtype=x.wide, device=x.q.device)
    for phase, move in each:
        _merge(out, threshold, *map(move.back, _outputs(phase, _operands(x, move))))
    if x.own is not None:
        both = torch.logaddexp(threshold, x.own.unsqueeze(-1).to(x.wide))
        out.mul_((_finite(threshold) - both).exp_().unsqueeze(-1).nan_to_num_())
        threshold = both
    return out.to(x.v.dtype), _finite(threshold)


def _outputs(task: Task, x: Operands) -> tuple[Tensor, Tensor]:
    """Output and thresholds of a phase."""
    if task.tiles:
        return cpp.outputs(x.q, x.k, x.v, x.bias, _described(task, x))
    shape = x.q.shape[:3]
    out = torch.zeros(*shape, x.v.shape[-1], dtype=x.v.dtype, device=x.q.device)
    threshold = torch.full(shape, -torch.inf, dtype=x.wide, device=x.q.device)
    for piece in pieces(task, x):
        scores = scores_of(task, x, piece)[0]
        here = task.weighting.threshold(scores, None if x.own is None else x.own[piece.heads])
        weights = task.weighting.used(task.weighting.weigh_(scores, _finite(here)))
        if task.dropout is not None:
            weights = weights.mul_(piece.part.kept(task.dropout, piece.rows, piece.heads))
        piece.queries(out).copy_(weights.to(x.v.dtype) @ piece.keys(x.v))
        piece.queries(threshold).copy_(here)
    return out if task.dropout is None else out.mul_(random.kept_scale(task.dropout.p)), threshold


def _described(task: Task, x: Operands) -> cpp.Description:
    return cpp.described(x.q, task.mask, task.dropout, task.scale, task.slopes, task.cap)


def _finite(threshold: Tensor) -> Tensor:
    """Rows that see nothing weigh 0: -inf less +inf."""
    return threshold.masked_fill(threshold == -torch.inf, torch.inf)


def _merge(out: Tensor, lse: Tensor, some: Tensor, more: Tensor) -> None:
    """Add a phase's output to those before, in place."""
    both = torch.logaddexp(lse, more)
    old, new = ((part - _finite(both)).exp_().unsqueeze(-1) for part in (lse, more))
    out.mul_(old).add_(some * new)
    lse.copy_(both)


def scores_of(task: Task, x: Operands, piece: Piece) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, Q, K] in fp32 or wider, which may be overwritten, -inf where nothing is seen; and the tanh of a
    cap, for its gradient."""
    scores = (piece.queries(x.q) @ piece.keys(x.k).mT).to(x.wide).mul_(task.scale)
    bent = None
    if task.cap is not None:
        bent = scores.div_(task.cap).tanh_()
        scores = bent * task.cap
    bias = x.bias if task.slopes is None else task.slopes
    if bias is not None:
        scores.add_(piece.pairs(bias))
    if task.draw is not None:
        where = piece.rows, piece.heads, piece.part.queries
        noise = task.draw.gumbel(*where, piece.part.numbers.to(scores.device))
        scores = (scores if noise is None else scores.add_(noise)).div_(task.temperature)
    seen = piece.part.seen(scores.device, piece.rows)
    if seen is not None:
        scores.masked_fill_(~seen, -torch.inf)
    return scores, bent


def gradients(task: Task, x: Operands, out: Tensor, threshold: Tensor, d_out: Tensor) -> list[Tensor | None]:
    """Of all operands."""
    total: dict[str, Tensor] = {
        name: torch.zeros_like(value, dtype=x.wide)
        for name, value in x._asdict().items()
        if value is not None
    }
    delta = (d_out.to(x.wide) * out.to(x.wide)).sum(-1)
    if x.own is not None:  # a sink takes what the weights leave
        share = (x.own.unsqueeze(-1).to(x.wide) - threshold).exp_()
        total["own"] -= (share * delta).sum((0, 2))
    for phase, move in _phases(task, x):
        if phase.tiles or move.apart:
            found = _of_phase(phase, _operands(x, move), *map(move.rows, (out, threshold, d_out)))
            total["q"] += move.back(found[0])
            move.add(total["k"], found[1])
            move.add(total["v"], found[2])
            if x.bias is not None:
                total["bias"] += found[3]
            continue
        scaled = d_out if task.dropout is None else d_out * random.kept_scale(task.dropout.p)
        for piece in pieces(phase, x):
            _pull(phase, x, piece, threshold, delta, scaled, total)
    return [None if value is None else total[name].to(value.dtype) for name, value in x._asdict().items()]


def _of_phase(task: Task, x: Operands, out: Tensor, threshold: Tensor, d_out: Tensor) -> list[Any]:
    """Gradients of queries, keys, values and the bias of a phase that is computed apart."""
    if not task.tiles:
        return gradients(task, x, out, threshold, d_out)[:4]
    wants_bias = x.bias is not None
    return list(cpp.gradients(d_out, x.q, x.k, x.v, out, threshold, x.bias, wants_bias, _described(task, x)))


def _pull(
    task: Task,
    x: Operands,
    piece: Piece,
    threshold: Tensor,
    delta: Tensor,
    d_out: Tensor,
    total: dict[str, Tensor],
) -> None:
    """Add a piece's gradients to the total."""
    part, here, narrow = piece.part, (piece.rows, piece.heads), x.q.dtype
    v, d = piece.keys(x.v), piece.queries(d_out)
    scores, bent = scores_of(task, x, piece)
    weights = task.weighting.weigh_(scores, piece.queries(threshold))
    d_weights, dropped = (d @ v.mT).to(x.wide), task.weighting.used(weights)
    if task.dropout is not None:
        kept = part.kept(task.dropout, *here)
        dropped, d_weights = dropped * kept, d_weights.mul_(kept)
    part.add(total["v"][here], dropped.to(narrow).mT @ d, 2)
    d_scores = task.weighting.pull_(weights, d_weights, piece.queries(delta))
    if task.draw is not None:
        d_scores = d_scores.div_(task.temperature)
    pull_scores(task, x, piece, d_scores, bent, total)


def pull_scores(
    task: Task,
    x: Operands,
    piece: Piece,
    d_scores: Tensor,
    bent: Tensor | None,
    total: dict[str, Tensor],
) -> None:
    """Add what a piece's gradient of its scores gives bias, queries and keys; it may be overwritten."""
    part, here = piece.part, (piece.rows, piece.heads)
    if x.bias is not None:
        part.add(total["bias"][piece.heads, part.queries], d_scores.sum(0), 2)
    if bent is not None:
        d_scores = d_scores.mul_(1 - bent.square_())
    d_scores = d_scores.mul_(task.scale).to(x.q.dtype)
    piece.queries(total["q"]).add_(d_scores @ piece.keys(x.k))
    part.add(total["k"][here], d_scores.mT @ piece.queries(x.q), 2)
