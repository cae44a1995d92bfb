"""Attention of a block: projections, QK-norm, positions, and the core that mixes tokens.

Shapes: B batch, S sequence, E hidden size, H query heads, K key/value heads, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from headway.kernels.attention.choose import KernelUnavailable, choose
from headway.kernels.attention.dense import WeightDropout
from headway.kernels.attention.masks import Mask
from headway.kernels.attention.registry import MECHANISMS
from headway.kernels.rotary import Rotation, rotate
from headway.pretrain import config
from headway.pretrain.errors import JobError
from headway.pretrain.models.layers import Dropout, Linear, Noise, RMSNorm, narrowed


class Core(nn.Module):
    """softmax and its kin: heads in, heads out. The socket that `parallel/` may replace."""

    def __init__(self, attention: config.Attention) -> None:
        super().__init__()
        self.mechanism, self.request = attention.mechanism, attention.kernel
        try:
            choose(self.mechanism, self.request, dropout=attention.dropout > 0)
        except KernelUnavailable as e:
            raise JobError("model.attention.kernel", e.value, e.rule, e.nearest) from None

    def forward(
        self, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, mask: Mask, dropout: WeightDropout | None
    ) -> Tensor:
        """Returns [B, H, S, D]."""
        kernel = choose(
            self.mechanism,
            self.request,
            dropout=dropout is not None,
            device=q_BHSD.device.type,
            dtype=q_BHSD.dtype,
            compiled=torch.compiler.is_compiling(),
        )
        return kernel.compute(q_BHSD, k_BKSD, v_BKSD, mask, dropout)

    def weights(self, q_BHSD: Tensor, k_BKSD: Tensor, mask: Mask) -> Tensor:
        """Attention weights by the mechanism's reference, [B, H, S, S]."""
        return MECHANISMS[self.mechanism].weights(q_BHSD, k_BKSD, mask)


class Attention(nn.Module):
    """Multi-head, grouped-query or multi-query self-attention.

    q, k and v are separate products, so that each can be split by heads.
    """

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.head_dim = model.head_width
        self.first_head = 0  # global index of the first head here; tensor parallelism sets it
        self.q = Linear(model.hidden, model.heads * self.head_dim, model.bias)
        self.k = Linear(model.hidden, model.kv * self.head_dim, model.bias)
        self.v = Linear(model.hidden, model.kv * self.head_dim, model.bias)
        self.o = Linear(model.heads * self.head_dim, model.hidden, model.bias)
        qk_norm = model.attention.qk_norm
        self.q_norm = RMSNorm(self.head_dim, model.norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, model.norm_eps) if qk_norm else None
        self.dropout = Dropout(model.attention.dropout)
        self.core = Core(model.attention)

    def forward(self, x_BSE: Tensor, mask: Mask, turn: Rotation | None, noise: Noise | None) -> Tensor:
        """Returns [B, S, E]."""
        x_BSE = narrowed(x_BSE)
        q_BHSD, k_BKSD, v_BKSD = (self._heads(project(x_BSE)) for project in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BHSD, k_BKSD = self.q_norm(q_BHSD), self.k_norm(k_BKSD)
        if turn is not None:
            q_BHSD, k_BKSD = rotate(q_BHSD, turn), rotate(k_BKSD, turn)
        y_BHSD = self.core(q_BHSD, k_BKSD, v_BKSD, mask, self._weight_dropout(noise, x_BSE.shape[1]))
        out: Tensor = self.o(y_BHSD.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        # The number of heads is inferred: under tensor parallelism only some of them are here.
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _weight_dropout(self, noise: Noise | None, length: int) -> WeightDropout | None:
        p = self.dropout.p
        if noise is None or p == 0:
            return None
        return WeightDropout(p, self.dropout.key(noise), noise.slots_B, noise.places(length), self.first_head)
