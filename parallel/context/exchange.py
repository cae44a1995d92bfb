"""Collectives along a sequence, with gradients: columns gathered, heads for columns, the first column, sums.

Every rank calls each of them, forward and backward. Shapes: B batch, S columns here, T columns of the whole sequence,
H heads, D anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from headway.parallel.context import layout


@dataclass(frozen=True)
class Team:
    """The ranks that share a sequence, and this one's place among them."""

    group: dist.ProcessGroup
    ranks: int
    rank: int

    def runs(self, total: int, rank: int | None = None) -> tuple[range, ...]:
        """Places of a rank's columns of a sequence; of this one's if none is named."""
        return layout.runs(total, self.ranks, self.rank if rank is None else rank)

    def sizes(self, total: int) -> list[int]:
        """Columns of every rank."""
        return [layout.columns(total, self.ranks, rank) for rank in range(self.ranks)]

    def gather(self, x: Tensor, total: int) -> Tensor:
        """All columns [B, T, ...], in order, from those of every rank [B, S, ...]."""
        whole: Tensor = _Gather.apply(x, total, self)
        return whole

    def heads_for_columns(self, x_BHSD: Tensor, total: int) -> Tensor:
        """All columns of a share of the heads: [B, H, S, D] -> [B, H / ranks, T, D]."""
        traded: Tensor = _Trade.apply(x_BHSD, total, self)
        return traded

    def columns_for_heads(self, x_BHTD: Tensor) -> Tensor:
        """This rank's columns of all heads: [B, H, T, D] -> [B, H x ranks, S, D]."""
        traded: Tensor = _TradeBack.apply(x_BHTD, self)
        return traded

    def first(self, x: Tensor) -> Tensor:
        """What the first rank has, which holds the first column; the others' own is not used."""
        found: Tensor = _First.apply(x, self)
        return found

    def sum(self, x: Tensor) -> Tensor:
        """Sum of every rank's share."""
        total: Tensor = _Sum.apply(x, self)
        return total


def _gathered(x: Tensor, total: int, team: Team) -> Tensor:
    sizes = team.sizes(total)
    padded = x.new_zeros(x.shape[0], max(sizes), *x.shape[2:])
    padded[:, : x.shape[1]] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded, group=team.group)
    together = torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)
    whole = torch.empty_like(together)
    whole[:, layout.by_rank(total, team.ranks, x.device)] = together
    return whole


def _mine(x: Tensor, dim: int, team: Team) -> Tensor:
    return torch.cat([x.narrow(dim, run.start, len(run)) for run in team.runs(x.shape[dim])], dim)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, team: Team) -> Tensor:
        ctx.team = team
        return _gathered(x, total, team)

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> Any:
        d_whole = d_whole.contiguous().clone()
        dist.all_reduce(d_whole, group=ctx.team.group)  # every rank read every column
        return _mine(d_whole, 1, ctx.team), None, None


def _to_columns(x_BHSD: Tensor, total: int, team: Team) -> Tensor:
    b, h, s, d = x_BHSD.shape
    sizes, share = team.sizes(total), b * (h // team.ranks) * d
    sent = x_BHSD.unflatten(1, (team.ranks, -1)).transpose(0, 1).contiguous()
    received = x_BHSD.new_empty(share * total)
    counts = [share * size for size in sizes]
    dist.all_to_all_single(received, sent.flatten(), counts, [share * s] * team.ranks, group=team.group)
    parts = [part.view(b, -1, size, d) for part, size in zip(received.split(counts), sizes, strict=True)]
    together = torch.cat(parts, 2)
    whole = torch.empty_like(together)
    whole[:, :, layout.by_rank(total, team.ranks, x_BHSD.device)] = together
    return whole


def _to_heads(x_BHTD: Tensor, team: Team) -> Tensor:
    b, h, total, d = x_BHTD.shape
    sizes = team.sizes(total)
    there = x_BHTD[:, :, layout.by_rank(total, team.ranks, x_BHTD.device)].split(sizes, 2)
    sent = torch.cat([part.flatten() for part in there])
    here, counts = sizes[team.rank], [b * h * d * size for size in sizes]
    received = x_BHTD.new_empty(team.ranks * b * h * here * d)
    dist.all_to_all_single(received, sent, [b * h * d * here] * team.ranks, counts, group=team.group)
    return received.view(team.ranks, b, h, here, d).transpose(0, 1).flatten(1, 2)


class _Trade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, total: int, team: Team) -> Tensor:
        ctx.team = team
        return _to_columns(x, total, team)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:
        return _to_heads(d_x, ctx.team), None, None


class _TradeBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team, ctx.total = team, x.shape[2]
        return _to_heads(x, team)

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:
        return _to_columns(d_x, ctx.total, ctx.team), None


class _First(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        found = x.clone(memory_format=torch.contiguous_format)
        dist.broadcast(found, group=team.group, group_src=0)
        return found

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:
        d_x = d_x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(d_x, group=ctx.team.group)
        return d_x if ctx.team.rank == 0 else torch.zeros_like(d_x), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=team.group)
        return total

    @staticmethod
    def backward(ctx: Any, d_x: Tensor) -> Any:
        d_x = d_x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(d_x, group=ctx.team.group)
        return d_x, None
