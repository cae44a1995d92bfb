"""Ring attention (Liu et al. 2023): keys and values go round the ranks while each computes with what it holds.

Partial outputs are merged by their log-sum-exp (Milakov and Gimelshein 2018). The backward recomputes weights from the
log-sum-exp over all keys, and the gradients of keys and values travel beside them and go home at the end. What travels
is on its way while the rank computes. Chunks that a mask hides by their places are not computed, and keys make no stop
that no rank needs: if a mask is local, only neighbours exchange anything.

Shapes: B batch, H query heads, K key/value heads, D head dimension, S queries here, M keys here, T keys of the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.kernels.attention import blocks
from headway.kernels.attention.dense import WeightDropout, per_query_head, score_scale
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.slopes import Bias, Slopes, learned, part_of
from headway.parallel.context.exchange import Team
from headway.parallel.context.layout import cuts


def attention(
    q_BHSD: Tensor,
    k_BKMD: Tensor,
    v_BKMD: Tensor,
    mask: Mask,
    dropout: WeightDropout | None,
    scale: float | None,
    bias_HST: Bias | None,
    team: Team,
) -> Tensor:
    """Attention of this rank's queries to all ranks' keys, [B, H, S, D].

    Args:
        mask: of the whole sequences, with their lengths (`Mask.split`).
        dropout: `positions` are the places of the queries here.
        bias_HST: of the queries here and all keys, in order.
    """
    slopes = bias_HST if isinstance(bias_HST, Slopes) else None
    task = Task(team, mask, dropout, score_scale(scale, q_BHSD), slopes)
    out: Tensor = _Ring.apply(q_BHSD, k_BKMD, v_BKMD, learned(bias_HST), task)
    return out


def hides(mask: Mask, queries: range, keys: range) -> bool:
    """Whether none of these queries can see any of these keys, by their places alone."""
    apart = max(queries.start - keys.stop, keys.start - queries.stop) + 1  # places between the nearest two
    return (mask.triangular and keys.start >= queries.stop) or (
        mask.window is not None and apart >= mask.window
    )


@dataclass(frozen=True)
class Part:
    """A run of queries and a run of keys: where they stand in what is here, and what is seen."""

    queries: slice
    keys: slice
    places: slice
    mask: Mask
    dropout: WeightDropout | None


@dataclass(frozen=True)
class Task:
    """What an attention is about, beside its operands."""

    team: Team
    mask: Mask
    dropout: WeightDropout | None
    scale: float
    slopes: Slopes | None = None

    def lengths(self) -> tuple[int, int]:
        assert self.mask.split is not None
        return self.mask.split

    def stops(self) -> list[int]:
        """How far keys travel: at stop t every rank has those of the rank t before it. Stop 0 is always one."""
        team, (asking, asked) = self.team, self.lengths()
        pairs = {
            (rank - source) % team.ranks
            for rank in range(team.ranks)
            for source in range(team.ranks)
            for queries in team.runs(asking, rank)
            for keys in team.runs(asked, source)
            if not hides(self.mask, queries, keys)
        }
        return sorted(pairs | {0})

    def parts(self, source: int) -> Iterator[Part]:
        """The parts that this rank computes with the keys of another."""
        asking, asked = (
            self.team.runs(length, rank)
            for length, rank in zip(self.lengths(), (self.team.rank, source), strict=True)
        )
        for queries, here in zip(asking, cuts(asking), strict=True):
            for keys, there in zip(asked, cuts(asked), strict=True):
                if not hides(self.mask, queries, keys):
                    seen, places = narrowed(self.mask, queries, keys), slice(keys.start, keys.stop)
                    yield Part(here, there, places, seen, self._dropped(here, keys))

    def _dropped(self, queries: slice, keys: range) -> WeightDropout | None:
        if self.dropout is None:
            return None
        return self.dropout._replace(positions=self.dropout.positions[queries], first_key=keys.start)


def narrowed(mask: Mask, queries: range, keys: range) -> Mask:
    """The mask of a run of queries and a run of keys."""
    documents, theirs, prefix, shift = mask.documents, mask.key_documents, mask.prefix, None
    if documents is not None:
        theirs = (documents if theirs is None else theirs)[:, keys.start : keys.stop]
        documents = documents[:, queries.start : queries.stop]
    causal = mask.causal and (prefix is not None or keys.stop - 1 > queries.start)
    apart = max(queries.stop - keys.start, keys.stop - queries.start) - 1  # places between the farthest two
    scope = None if mask.window is None or apart < mask.window else mask.scope
    if prefix is not None:
        prefix = prefix - keys.start
    if (causal and prefix is not None) or ((causal or scope) and queries != keys):
        shift = keys.start - queries.start
    return Mask(causal, documents, theirs, prefix, shift, scope=scope)


def _pass_on(sent: Tensor, buffer: Tensor, hop: int, team: Team) -> list[Any]:
    """Send to the rank `hop` further on and receive from the one `hop` before."""
    onward, back = (team.rank + hop) % team.ranks, (team.rank - hop) % team.ranks
    return dist.batch_isend_irecv(
        [
            dist.P2POp(dist.isend, sent, group=team.group, group_peer=onward),
            dist.P2POp(dist.irecv, buffer, group=team.group, group_peer=back),
        ]
    )


def _wait(pending: list[Any]) -> None:
    for work in pending:
        work.wait()


def travel(kv: Tensor, task: Task) -> Iterator[tuple[int, Tensor]]:
    """Ranks and their keys and values [2, B, K, M, D], as they come by; the next are under way meanwhile."""
    team, stops, asked = task.team, task.stops(), task.lengths()[1]
    sizes = team.sizes(asked)
    for i, stop in enumerate(stops):
        pending: list[Any] = []
        if i + 1 < len(stops):
            coming = sizes[(team.rank - stops[i + 1]) % team.ranks]
            buffer = kv.new_empty(*kv.shape[:3], coming, kv.shape[4])
            pending = _pass_on(kv, buffer, stops[i + 1] - stop, team)
        yield (team.rank - stop) % team.ranks, kv
        if pending:
            _wait(pending)
            kv = buffer


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, task: Task) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        least = torch.finfo(wide).min
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        lse = torch.full(q.shape[:3], least, dtype=wide, device=q.device)
        for source, kv in travel(torch.stack((k, v)), task):
            for part in task.parts(source):
                here = part.queries
                operands: Any = _operands(part, q, kv, bias if task.slopes is None else task.slopes)
                some, more = blocks.outputs(*(*operands, task.scale, part.mask, part.dropout))
                more = torch.nan_to_num(more, nan=least, neginf=least)  # of queries that see nothing here
                both = torch.logaddexp(lse[:, :, here], more)
                old, new = ((x - both).exp().unsqueeze(-1) for x in (lse[:, :, here], more))
                out[:, :, here] = out[:, :, here] * old + some * new
                lse[:, :, here] = both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.task = task
        return out

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> Any:
        q, k, v, bias, out, lse = ctx.saved_tensors
        task: Task = ctx.task
        dq = torch.zeros(q.shape, dtype=lse.dtype, device=q.device)
        d_bias = torch.zeros_like(bias, dtype=lse.dtype) if ctx.needs_input_grad[3] else None
        homeward = Homeward(task, lse.dtype)
        for source, kv in travel(torch.stack((k, v)), task):
            d_kv = torch.zeros(kv.shape, dtype=lse.dtype, device=kv.device)
            for part in task.parts(source):
                here, there = part.queries, part.keys
                operands = _operands(part, q, kv, bias if task.slopes is None else task.slopes)
                mine: Any = (x[:, :, here] for x in (out, lse))
                d_q, d_k, d_v, d_b = blocks.gradients(
                    d_out[:, :, here],
                    *(*operands, *mine, task.scale, part.mask, part.dropout, d_bias is not None),
                )
                dq[:, :, here] += d_q
                d_kv[0, :, :, there] += _per_key_head(d_k, kv.shape[2])
                d_kv[1, :, :, there] += _per_key_head(d_v, kv.shape[2])
                if d_bias is not None:
                    d_bias[:, here, part.places] += d_b
            d_kv = homeward.add(d_kv)
        return dq.to(q.dtype), *d_kv.to(k.dtype), None if d_bias is None else d_bias.to(bias.dtype), None


class Homeward:
    """Gradients of keys and values on their way: from stop to stop as these were, then home."""

    def __init__(self, task: Task, dtype: torch.dtype) -> None:
        self.team, self.stops, self.sizes = task.team, task.stops(), task.team.sizes(task.lengths()[1])
        self.dtype, self.stop = dtype, 0
        self.pending: list[Any] = []
        self.buffer: Tensor | None = None

    def add(self, d_kv: Tensor) -> Tensor:
        """Add this stop's gradients to those that arrive and send them on; at the last stop, return one's own."""
        _wait(self.pending)
        if self.buffer is not None:
            d_kv += self.buffer
        team, last = self.team, self.stop + 1 == len(self.stops)
        until = team.ranks if last else self.stops[self.stop + 1]
        hop = until - self.stops[self.stop]
        self.stop += 1
        if hop == team.ranks:
            return d_kv
        coming = self.sizes[(team.rank - until) % team.ranks]
        self.buffer = d_kv.new_empty(*d_kv.shape[:3], coming, d_kv.shape[4])
        self.sent = d_kv  # must outlive the sending
        self.pending = _pass_on(d_kv, self.buffer, hop, team)
        if last:
            _wait(self.pending)
        return self.buffer


def _operands(part: Part, q: Tensor, kv: Tensor, bias: Bias | None) -> Any:
    """q, k, v and bias of a part, as many heads of each."""
    q_part = q[:, :, part.queries]
    k_part, v_part = (per_query_head(x[:, :, part.keys], q_part) for x in kv)
    return q_part, k_part, v_part, None if bias is None else part_of(bias, part.queries, part.places)


def _per_key_head(gradient_BHMD: Tensor, heads: int) -> Tensor:
    """Gradients of keys or values, summed over the query heads that share them."""
    return gradient_BHMD.unflatten(1, (heads, -1)).sum(
        2, dtype=torch.promote_types(gradient_BHMD.dtype, torch.float32)
    )
