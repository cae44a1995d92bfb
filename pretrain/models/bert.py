"""BERT: a bidirectional encoder (Devlin et al. 2019); with shared blocks and a factorised table, ALBERT (Lan et al.
2020).

Shapes: B batch, S sequence, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.embeddings import TokenEmbedding
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Linear, Noise
from headway.pretrain.models.taps import Taught
from headway.pretrain.models.transformer import Tower


class BERT(Tower):
    """Embeddings, a stack of blocks, a pooler if the model has one."""

    embed: TokenEmbedding

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__(model, causal=False, embed=TokenEmbedding(model, inputs), tokens=inputs.length)
        self.pooler = Linear(model.hidden, model.hidden) if model.pooler else None

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        noise: Noise | None = None,
        embedded_BSE: Tensor | None = None,
        columns: Columns | None = None,
        taught: Taught | None = None,
    ) -> Hidden:
        """
        Args:
            tokens_BS: int64.
            documents_BS: int, of the whole row; tokens see their own document only (padding is document -1). None: all
                see all.
            segments_BS: int64, rows of the segment table; 0 if None.
            noise: what dropout depends on; None drops nothing.
            embedded_BSE: what goes into the first block, where something else has embedded the tokens.
            columns: which columns of the row the tokens are; all if None.
            taught: what a teacher gave, for taps of blocks.
        """
        columns = Columns.of(columns, tokens_BS)
        x_BSE = (
            self.embed(tokens_BS, columns.places_S, noise, segments_BS)
            if embedded_BSE is None
            else embedded_BSE
        )
        final, sides = self.run(x_BSE, columns, Mask(False, documents_BS), noise, taught=taught)
        pooled = None if self.pooler is None else torch.tanh(self.pooler(final[:, 0]))
        return Hidden(final, sides, pooled)
