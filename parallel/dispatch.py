"""Tokens to experts on other ranks and back: the dispatcher of MoE layers under expert parallelism.

Shapes: N tokens of this rank, P pairs, R rows (pairs that are computed), T rows that arrive from all ranks for this
rank's experts, G ranks of an expert group, X experts, L experts of a rank, E hidden size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from headway.kernels import grouped
from headway.kernels.experts import KERNELS, Pairs, Weights
from headway.parallel.mesh import World
from headway.pretrain.models.moe import Dispatcher
from headway.pretrain.optim.sharded import local


class ExpertDispatcher(nn.Module):
    """`models.moe.Dispatcher` where a rank has L of X experts: rows go to their experts' ranks, and outputs come back.

    Additions are those of one process in the same order: a token's outputs by expert, an expert's rows by rank and
    place. All ranks of a group call it together, with or without tokens. Ranks along the tensor axis have the same
    tokens; each sends a share of them and gathers the others' outputs.

    Compiled code is left at the door: what is sent depends on the data.
    """

    def __init__(self, inner: Dispatcher, world: World) -> None:
        super().__init__()
        assert world.experts is not None
        self.inner = inner
        self.group = world.experts.get_group("expert")
        self.ranks = world.layout.expert
        self.tensor = world.group("tensor") if world.layout.tensor > 1 else None

    @torch.compiler.disable
    def forward(self, x_NE: Tensor, pairs: Pairs, weights: Weights) -> Tensor:
        """Sum over a token's experts of weight * expert(x), [N, E].

        Args:
            weights: DTensors, cut along X.
        """
        mine = Weights._make(None if w is None else local(w) for w in weights)
        if self.tensor is None:
            return self._exchange(x_NE, pairs, mine)
        share_NE, share = split_tokens(x_NE, pairs, self.ranks * len(mine.up_XFE), self.tensor)
        return _Gather.apply(self._exchange(share_NE, share, mine), len(x_NE), self.tensor)

    def _exchange(self, x_NE: Tensor, pairs: Pairs, mine: Weights) -> Tensor:
        experts = len(mine.up_XFE)
        expert_P, order_P = pairs.expert_P.sort(stable=True)  # pairs that are not computed come last
        ends_X = torch.searchsorted(
            expert_P, torch.arange(self.ranks * experts, device=expert_P.device), right=True
        )
        send_GL = ends_X.diff(prepend=ends_X.new_zeros(1)).view(self.ranks, experts)
        receive_GL = torch.empty_like(send_GL)
        dist.all_to_all_single(receive_GL, send_GL, group=self.group)
        counts = torch.cat(
            [send_GL.sum(1), receive_GL.sum(1), receive_GL.sum(0)]
        ).tolist()  # one wait for a GPU
        send_G, receive_G, receive_L = (
            counts[: self.ranks],
            counts[self.ranks :][: self.ranks],
            counts[-experts:],
        )
        order_R = order_P[: sum(send_G)]
        token_R = pairs.token_P.index_select(0, order_R)
        x_TE = _AllToAll.apply(grouped.take_rows(x_NE, token_R), send_G, receive_G, self.group)
        pairs_T = arrived(receive_GL, receive_L, torch.promote_types(x_NE.dtype, torch.float32))
        y_TE = self._compute(x_TE, pairs_T, mine)
        y_RE = _AllToAll.apply(y_TE, receive_G, send_G, self.group)
        return grouped.combine_rows(y_RE, pairs.weight_P.index_select(0, order_R), token_R, len(x_NE))

    def _compute(self, x_TE: Tensor, pairs: Pairs, mine: Weights) -> Tensor:
        """What this rank's experts make of the rows that arrived. Without rows, gradients are still zeros, not missing:
        what follows the backward is collective."""
        name = self.inner.choose(x_TE, mine) if len(x_TE) else "reference"
        return KERNELS[name](x_TE, pairs, mine, self.inner.activation)


def arrived(counts_GL: Tensor, counts_L: list[int], dtype: torch.dtype) -> Pairs:
    """Pairs of rows that lie in order of the rank they came from, then of expert; every row is its own token.

    Args:
        counts_GL: rows from each rank for each expert; `counts_L` are their sums.
        dtype: of the weights, which are one.
    """
    device, counts, rows = counts_GL.device, counts_GL.flatten(), sum(counts_L)
    run_T = torch.arange(len(counts), device=device).repeat_interleave(counts, output_size=rows)
    row_T = torch.arange(rows, device=device)
    # An expert's places go on from rank to rank.
    first = (counts_GL.cumsum(0) - counts_GL).flatten() - (counts.cumsum(0) - counts)
    ones_T = torch.ones(rows, dtype=dtype, device=device)
    return Pairs(row_T, run_T % len(counts_L), ones_T, row_T + first[run_T], max(counts_L))


def split_tokens(x_NE: Tensor, pairs: Pairs, experts: int, group: dist.ProcessGroup) -> tuple[Tensor, Pairs]:
    """This rank's run of the tokens that all ranks of a group hold, and its pairs; gradients of all tokens come back to
    every rank."""
    share = -(-len(x_NE) // group.size())
    first = min(len(x_NE), group.rank() * share)
    last = min(len(x_NE), first + share)
    here_P = (pairs.token_P >= first) & (pairs.token_P < last)
    expert_P = torch.where(here_P, pairs.expert_P, experts)
    weight_P = _Same.apply(pairs.weight_P, group)
    return _Split.apply(x_NE, first, last, group), pairs._replace(
        token_P=torch.where(here_P, pairs.token_P - first, 0), expert_P=expert_P, weight_P=weight_P
    )


class _AllToAll(torch.autograd.Function):
    """Rows to the ranks of a group, so many to each; the backward sends gradients the way back."""

    @staticmethod
    def forward(ctx, x_RE, send_G, receive_G, group):
        ctx.way_back = receive_G, send_G, group
        return _sent(x_RE, send_G, receive_G, group)

    @staticmethod
    def backward(ctx, g_TE):
        return _sent(g_TE, *ctx.way_back), None, None, None


def _sent(x_RE: Tensor, send_G: list[int], receive_G: list[int], group: dist.ProcessGroup) -> Tensor:
    x_TE = x_RE.new_empty(sum(receive_G), x_RE.shape[1])
    dist.all_to_all_single(x_TE, x_RE.contiguous(), receive_G, send_G, group=group)
    return x_TE


class _Split(torch.autograd.Function):
    """Rows first to last of rows that all ranks hold; the backward gathers the gradients of all of them."""

    @staticmethod
    def forward(ctx, x_NE, first, last, group):
        ctx.count, ctx.group = len(x_NE), group
        return x_NE[first:last].clone()

    @staticmethod
    def backward(ctx, g_RE):
        return _gathered(g_RE, ctx.count, ctx.group), None, None, None


class _Gather(torch.autograd.Function):
    """The reverse of `_Split`."""

    @staticmethod
    def forward(ctx, x_RE, count, group):
        share = -(-count // group.size())
        ctx.first, ctx.rows = min(count, group.rank() * share), len(x_RE)
        return _gathered(x_RE, count, group)

    @staticmethod
    def backward(ctx, g_NE):
        return g_NE[ctx.first : ctx.first + ctx.rows].clone(), None, None


def _gathered(x_RE: Tensor, count: int, group: dist.ProcessGroup) -> Tensor:
    share = -(-count // group.size())
    padded = x_RE.new_zeros(share, x_RE.shape[1])
    padded[: len(x_RE)] = x_RE
    whole = x_RE.new_empty(share * group.size(), x_RE.shape[1])
    dist.all_gather_into_tensor(whole, padded, group=group)
    return whole[:count]


class _Same(torch.autograd.Function):
    """Numbers that all ranks hold and each uses a part of; the backward adds up their gradients."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        total = g.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None
