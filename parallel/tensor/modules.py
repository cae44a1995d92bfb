"""Modules of the model under tensor parallelism: each is the class of the model with a part of its parameters.

`become` changes a module's class in place, so names, hooks and code that reads the module stay as they are.
Shapes: B batch, S sequence, E hidden size, V vocabulary, N tokens, X experts.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from headway.kernels.experts import Pairs, Weights
from headway.parallel.tensor.collectives import (
    Columns,
    enter,
    enter_columns,
    leave,
    leave_columns,
    local_part,
    part,
    total,
    whole,
)
from headway.pretrain.models.spectral import SpectralLinear


class Local:
    """Parameters read as this rank's part; gradients flow back to the whole.

    Attributes:
        shares: names of whole parameters whose gradient is a sum over ranks.
        columns: how the sequence is cut where this module is called; None where all ranks have all of it.
    """

    mesh: Any
    group: str
    rank: int
    shares: frozenset[str]
    columns: Any  # Columns or None

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        if isinstance(value, DTensor) and value.device_mesh == self.mesh:
            return local_part(value, share=name in self.shares)
        return value  # not gathered by FSDP: nothing computes with it

    def into(self, x: Tensor) -> Tensor:
        """What all ranks are to compute their shares of."""
        return enter(x, self.group) if self.columns is None else enter_columns(x, self.columns)

    def out(self, x: Tensor) -> Tensor:
        """The sum of the shares."""
        return leave(x, self.group) if self.columns is None else leave_columns(x, self.columns)


class Copies(Local):
    """A linear layer for keys or values, of which there are fewer heads than ranks: whole, and each rank computes
    the head that its queries read.

    Attributes:
        rows: of the weight.
    """

    rows: slice

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias
        return F.linear(x, matrix(self)[self.rows], None if bias is None else bias[self.rows])


class Rows(Local):
    """A linear layer whose inputs are cut: partial outputs are summed, the bias is added once."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.out(F.linear(x, matrix(self)))
        bias = self.bias
        return y if bias is None else y + bias.to(y.dtype)


class SpectralPart(Local):
    """sigmaReparam of a weight that is cut: u^T W v is a sum over ranks.

    Attributes:
        cut: the dim of the weight that is cut.
        starts: of outputs, where the ranks after the first begin.
    """

    direction: Tensor
    weight: Tensor
    cut: int
    starts: list[int]

    def sigma(self) -> Tensor:
        u_O, weight_OI, cut = self.direction, self.weight, self.cut
        with torch.autocast(weight_OI.device.type, enabled=False):
            if cut == 0:
                u_O = u_O.tensor_split(self.starts)[self.rank]
            v_I = u_O @ weight_OI.detach()
            if cut == 0:
                v_I = F.normalize(total(v_I, self.group), dim=0)
            else:
                v_I = v_I / total(v_I.square().sum(), self.group).sqrt()
            return enter(leave(torch.dot(u_O, weight_OI @ v_I), self.group), self.group)


class Inner(Local):
    """A feed-forward layer: its input is what every rank has, and each computes a part of the width."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.into(x))  # type: ignore[misc]


class Experts(Local):
    """A layer of experts where the sequence is cut: rows are routed whole."""

    def forward(self, x_BSE, noise, valid_BS=None, length=None):
        columns = self.columns
        if noise is not None:
            noise = noise._replace(positions_S=columns.positions)
        y_BSE, side = super().forward(whole(x_BSE, columns), noise, valid_BS, length)  # type: ignore[misc]
        return part(y_BSE, columns), side


class Cut(Local):
    """A stack of blocks that hold a part of the sequence each, but where they mix columns."""

    def forward(self, x_BSE, context):
        columns: Columns = self.columns
        noise, outputs = context.noise, context.outputs
        columns.length = x_BSE.shape[1]
        if noise is not None:
            columns.positions = noise.places(columns.length)
            padded = F.pad(columns.positions, (0, columns.width * columns.ranks - columns.length))
            mine = padded[columns.rank * columns.width :][: columns.width]
            context = context._replace(noise=noise._replace(positions_S=mine))
        x_BSE, sides = super().forward(part(x_BSE, columns), context._replace(outputs=None))  # type: ignore[misc]
        last = self.span is None or self.span[1] == self.uses
        return whole(x_BSE, columns)[:, : outputs if last else None], sides


class Heads(Local):
    """Attention by this rank's heads."""

    ranks: int

    def forward(
        self, x_BSE, mask, turn=None, noise=None, bias_HSM=None, memory_BME=None, queries=None, **others
    ):
        if memory_BME is not None:
            memory_BME = enter(memory_BME, self.group)
        others = {name: self.into(x) for name, x in others.items()}  # what values are made of
        if noise is not None and self.columns is not None:
            noise = noise._replace(positions_S=self.columns.positions)
        inputs = self.into(x_BSE), mask, turn, noise, bias_HSM, memory_BME, queries
        y_BSE, beside = super().forward(*inputs, **others)  # type: ignore[misc]
        if beside.entropy_B is not None:  # a mean over heads
            beside = beside._replace(entropy_B=leave(beside.entropy_B / self.ranks, self.group))
        return y_BSE, beside

    def mean_span(self):
        span = super().mean_span()  # type: ignore[misc]
        return None if span is None else leave(span / self.ranks, self.group)


class Streams(Local):
    """A tap: it sees this rank's heads, and of the residual stream what all ranks hold together."""

    def states(self, before_BSE, after_BSE, mask, taught):
        if self.columns is not None:
            before_BSE, after_BSE = whole(before_BSE, self.columns), whole(after_BSE, self.columns)
        return super().states(before_BSE, after_BSE, mask, taught)  # type: ignore[misc]


class Compared(Streams):
    """A tap whose findings about attention are means over heads."""

    ranks: int

    def attention(self, shown, taught, across=False):
        side = super().attention(shown, taught, across)  # type: ignore[misc]
        return {name: leave(value / self.ranks, self.group) for name, value in side.items()}


class Words(Local):
    """A table of words of which each rank has some rows: the others' rows are zeros in the sum."""

    first: int

    def forward(self, tokens: Tensor) -> Tensor:
        weight = self.weight
        here = tokens - self.first
        mine = (here >= 0) & (here < weight.shape[0])
        rows = F.embedding(torch.where(mine, here, 0), weight)
        return leave(torch.where(mine.unsqueeze(-1), rows, 0), self.group)


class Widths(nn.Module):
    """A dispatcher in front of experts whose width is cut: the weights of pairs are used by every rank."""

    def __init__(self, inner: nn.Module, group: str, rank: int) -> None:
        super().__init__()
        self.inner, self.group, self.rank = inner, group, rank

    def forward(self, x_NE: Tensor, pairs: Pairs, weights: Weights) -> Tensor:
        pairs = pairs._replace(weight_P=enter(pairs.weight_P, self.group))
        if weights.down_bias_XE is not None:  # one rank adds it
            weights = weights._replace(down_bias_XE=weights.down_bias_XE * float(self.rank == 0))
        return leave(self.inner(enter(x_NE, self.group), pairs, weights), self.group)


def matrix(linear: Any) -> Tensor:
    """What a linear layer multiplies by, this rank's part."""
    weight: Tensor = linear.weight
    return weight * (linear.gain / linear.sigma()) if isinstance(linear, SpectralLinear) else weight


def become(module: nn.Module, role: type, **facts: Any) -> None:
    """Make a module play a role beside what it is; `facts` are the attributes that the role reads."""
    kind: Any = type(module)
    if not isinstance(module, role):
        module.__class__ = _played(role, kind)
    module.__dict__.update(facts)


@cache
def _played(role: type, kind: Any) -> Any:
    return type(f"{role.__name__}{kind.__name__}", (role, kind), {})
