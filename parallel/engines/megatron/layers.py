"""Megatron-Core's parallel layers in the places of ours, under the same names and with the same parameters.

Each is made from a layer that `headway.parallel.tensor.split` has cut, takes over its parameters, this rank's part
of them, and gives a tensor as ours do. Parts need not be equal: the last rank may have fewer features or words.
Communication is not the linears': see `regions`.

Shapes: N tokens, I inputs, O outputs, E hidden size, V words, of which v are this rank's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from torch import Tensor, nn

Leave = Callable[[Tensor], Tensor]
"""Partial outputs -> what goes on: their sum, or this rank's columns of it."""


class Column(ColumnParallelLinear):
    """Outputs are cut: this rank computes x W^T + b for its rows of W. Its input has entered the region already."""

    get_extra_state = nn.Module.get_extra_state  # states have parameters only
    set_extra_state = nn.Module.set_extra_state

    def __init__(self, linear: nn.Linear, config: ModelParallelConfig, group: dist.ProcessGroup) -> None:
        with torch.device("meta"):
            super().__init__(
                linear.in_features,
                linear.weight.shape[0] * group.size(),
                config=config,
                init_method=None,
                bias=linear.bias is not None,
                disable_grad_reduce=True,
                tp_group=group,
            )
        adopt(self, linear)

    def forward(self, x: Tensor) -> Tensor:
        y_NO: Tensor = super().forward(x.flatten(0, -2))[0]
        return y_NO.unflatten(0, x.shape[:-1])


class Row(RowParallelLinear):
    """Inputs are cut: partial outputs are summed by `out`, the bias is added once."""

    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def __init__(
        self, linear: nn.Linear, config: ModelParallelConfig, group: dist.ProcessGroup, out: Leave
    ) -> None:
        with torch.device("meta"):
            super().__init__(
                linear.weight.shape[1] * group.size(),
                linear.out_features,
                config=config,
                init_method=None,
                bias=linear.bias is not None,
                input_is_parallel=True,
                skip_bias_add=False,
                tp_group=group,
            )
        adopt(self, linear)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        y_NO = self._forward_impl(
            input=x.flatten(0, -2),
            weight=self.weight,
            bias=None,
            gradient_accumulation_fusion=self.gradient_accumulation_fusion,
            allreduce_dgrad=False,
            sequence_parallel=False,
            grad_output_buffer=None,
            tp_group=self.tp_group,
        )
        return biased(self.out(y_NO.unflatten(0, x.shape[:-1])), self.bias)


class Table(VocabParallelEmbedding):
    """A table of words of which this rank has v, from `first` on; rows of all ranks are summed."""

    def __init__(
        self, table: nn.Embedding, first: int, config: ModelParallelConfig, group: dist.ProcessGroup
    ) -> None:
        mine = table.weight.shape[0]
        with torch.device("meta"):
            super().__init__(
                mine * group.size(), table.embedding_dim, init_method=None, config=config, tp_group=group
            )
        adopt(self, table)
        self.num_embeddings = table.num_embeddings  # of all ranks
        self.vocab_start_index, self.vocab_end_index = first, first + mine
        self.num_embeddings_per_partition = mine


class Linears(NamedTuple):
    """Classes for linear layers of which outputs are cut, and inputs."""

    column: Any
    row: Any


@cache
def linear_classes(device: str) -> Linears:
    """Transformer Engine's linears on GPUs where it is installed, Megatron's plain ones otherwise.

    Those of Transformer Engine have been read, not run: there was no GPU with it where this was written.
    """
    if device == "cuda" and find_spec("transformer_engine"):
        from headway.parallel.engines.megatron import te

        return Linears(te.Column, te.Row)
    return Linears(Column, Row)


def adopt(layer: nn.Module, cut: nn.Module) -> None:
    """Give a layer the parameters of the one that it replaces, which have been cut, and what roles know of it."""
    for name, parameter in cut.named_parameters(recurse=False):
        setattr(layer, name, parameter)
    layer.train(cut.training)


def biased(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype)
