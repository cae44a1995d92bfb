"""Transformer Engine's linears for this rank's part of a product, in the places of ours.

They only multiply, with the kernels of Transformer Engine; regions are entered and left as with Megatron's plain
linears. Its own tensor parallelism would take one collective for each linear. Read against Megatron-Core 0.16.1 and
never run: see `layers.linear_classes`.
"""

from __future__ import annotations

import dataclasses

import torch.distributed as dist
from megatron.core.extensions.transformer_engine import TELinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from headway.parallel.engines.megatron.layers import Leave, adopt, biased


class Part(TELinear):
    """A whole linear layer of the part's shape, as Transformer Engine sees it."""

    def __init__(self, linear: nn.Linear, bias: bool, config: TransformerConfig) -> None:
        outputs, inputs = linear.weight.shape
        super().__init__(
            inputs,
            outputs,
            parallel_mode="duplicated",
            config=dataclasses.replace(
                config, use_cpu_initialization=False, init_model_with_meta_device=True
            ),
            init_method=nn.init.zeros_,
            bias=bias,
            skip_bias_add=False,
            skip_weight_param_allocation=False,
        )
        adopt(self, linear)


class Column(Part):
    """Outputs are cut."""

    def __init__(self, linear: nn.Linear, config: TransformerConfig, group: dist.ProcessGroup) -> None:
        super().__init__(linear, linear.bias is not None, config)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)[0]
        return y


class Row(Part):
    """Inputs are cut: partial outputs are summed by `out`, the bias is added once."""

    def __init__(
        self, linear: nn.Linear, config: TransformerConfig, group: dist.ProcessGroup, out: Leave
    ) -> None:
        super().__init__(linear, False, config)
        self.out = out

    def forward(self, x: Tensor) -> Tensor:
        # Transformer Engine, which adds no bias here, has an empty tensor of that name where there is none.
        return biased(self.out(super().forward(x)[0]), self._parameters.get("bias"))
