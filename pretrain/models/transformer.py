"""The one transformer core: a block, and a stack of blocks.

Shapes: B batch, S sequence, E hidden size.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.kernels.rotary import Rotation
from headway.pretrain import config
from headway.pretrain.models.attention import Attention
from headway.pretrain.models.layers import MLP, Dropout, Noise, build_norm


class Context(NamedTuple):
    """What every block of a forward is told.

    Attributes:
        mask: which keys a query sees.
        turn: rotary angles, or None.
        noise: what dropout depends on; None drops nothing.
    """

    mask: Mask = Mask()
    turn: Rotation | None = None
    noise: Noise | None = None


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to the residual stream.

    Pre-norm (Xiong et al. 2020): x + f(norm(x)). Post-norm (Vaswani et al. 2017): norm(x + f(x)).
    """

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.pre = model.norm_position == "pre"
        self.attention_norm = build_norm(model)
        self.attention = Attention(model)
        self.attention_dropout = Dropout(model.dropout)
        self.mlp_norm = build_norm(model)
        self.mlp = MLP(model)
        self.mlp_dropout = Dropout(model.dropout)

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        """Returns [B, S, E] in the residual stream's dtype."""
        mask, turn, noise = context
        if self.pre:
            x_BSE = x_BSE + self.attention_dropout(
                self.attention(self.attention_norm(x_BSE), mask, turn, noise), noise
            )
            return x_BSE + self.mlp_dropout(self.mlp(self.mlp_norm(x_BSE)), noise)
        x_BSE = self.attention_norm(
            x_BSE + self.attention_dropout(self.attention(x_BSE, mask, turn, noise), noise)
        )
        return self.mlp_norm(x_BSE + self.mlp_dropout(self.mlp(x_BSE), noise))


class Stack(nn.ModuleList):
    """Blocks in order; a slice of a stack is a stack."""

    def forward(self, x_BSE: Tensor, context: Context) -> Tensor:
        for block in self:
            x_BSE = block(x_BSE, context)
        return x_BSE
