"""GPT: a causal decoder, from GPT-2 (Radford et al. 2019) to Llama (Touvron et al. 2023) by configuration.

Shapes: B batch, S sequence, E hidden size, H query heads, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.attention import Core
from headway.pretrain.models.layers import Dropout, Embedding, Noise, build_norm
from headway.pretrain.models.positions import LearnedPositions, RotaryPositions
from headway.pretrain.models.transformer import Block, Context, Stack


class Hidden(NamedTuple):
    """What the model gives to an objective.

    Attributes:
        final: [B, S, E], normed: what a head reads.
    """

    final: Tensor


class TokenEmbedding(nn.Module):
    """Token rows, plus learned position rows if the model has them, then dropout."""

    def __init__(self, model: config.Model, vocab: int, seq_len: int) -> None:
        super().__init__()
        rows = model.max_positions or seq_len
        self.tokens = Embedding(vocab, model.hidden)
        self.positions = LearnedPositions(rows, model.hidden) if model.positions == "learned" else None
        self.dropout = Dropout(model.dropout)

    def forward(self, tokens_BS: Tensor, positions_S: Tensor, noise: Noise | None) -> Tensor:
        x_BSE: Tensor = self.tokens(tokens_BS)
        if self.positions is not None:
            x_BSE = x_BSE + self.positions(positions_S)
        dropped: Tensor = self.dropout(x_BSE, noise)
        return dropped


class GPT(nn.Module):
    """Embeddings, a stack of blocks, a final norm (pre-norm models only)."""

    def __init__(self, model: config.Model, vocab: int, seq_len: int) -> None:
        """
        Args:
            model: the shape.
            vocab: rows of the token table.
            seq_len: rows of the learned position table, unless `model.max_positions` says otherwise.
        """
        super().__init__()
        self.embed = TokenEmbedding(model, vocab, seq_len)
        self.rotary = (
            RotaryPositions(model.head_width, model.rotary_base) if model.positions == "rotary" else None
        )
        self.blocks = Stack(Block(model) for _ in range(model.layers))
        self.norm = build_norm(model) if model.norm_position == "pre" else nn.Identity()

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        positions_S: Tensor | None = None,
        noise: Noise | None = None,
    ) -> Hidden:
        """
        Args:
            tokens_BS: int64.
            documents_BS: int; tokens see their own document only. None: all earlier tokens.
            positions_S: int64, the columns' places in the sequence; 0, 1, ... if None.
            noise: what dropout depends on; None drops nothing.
        """
        if positions_S is None:
            positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSE = self.embed(tokens_BS, positions_S, noise)
        turn = None if self.rotary is None else self.rotary(positions_S, x_BSE.dtype)
        x_BSE = self.blocks(x_BSE, Context(Mask(True, documents_BS), turn, noise))
        return Hidden(self.norm(x_BSE))


@torch.no_grad()
def attention_maps(model: GPT, tokens_BS: Tensor) -> Tensor:
    """Attention weights of every layer and head, [layers, B, H, S, S], by the mechanism's reference."""
    maps: list[Tensor] = []

    def record(core: Any, heads: Any) -> None:
        q_BHSD, k_BKSD, _, mask, _ = heads
        maps.append(core.weights(q_BHSD, k_BKSD, mask))

    cores = [module for module in model.modules() if isinstance(module, Core)]
    hooks = [core.register_forward_pre_hook(record) for core in cores]
    try:
        with torch.compiler.set_stance("force_eager"):
            model(tokens_BS)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(maps)
