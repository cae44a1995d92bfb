"""GPT: a causal decoder, from GPT-2 (Radford et al. 2019) to Llama (Touvron et al. 2023) by configuration.

Shapes: B batch, S sequence, E hidden size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.embeddings import TokenEmbedding
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.transformer import Tower


class GPT(Tower):
    """Embeddings, a stack of blocks, a final norm (pre-norm models only)."""

    embed: TokenEmbedding

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__(model, causal=True, embed=TokenEmbedding(model, inputs))

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        positions_S: Tensor | None = None,
        noise: Noise | None = None,
        prefix_B: Tensor | None = None,
        embedded_BSE: Tensor | None = None,
    ) -> Hidden:
        """
        Args:
            tokens_BS: int64.
            documents_BS: int; tokens see their own document only. None: all earlier tokens.
            positions_S: int64, the columns' places in the sequence; 0, 1, ... if None.
            noise: what dropout depends on; None drops nothing.
            prefix_B: int64; so many first tokens of a row are seen by all of it (prefix LM).
            embedded_BSE: what goes into the first block, where something else has embedded the tokens.
        """
        if positions_S is None:
            positions_S = torch.arange(tokens_BS.shape[1], device=tokens_BS.device)
        x_BSE = self.embed(tokens_BS, positions_S, noise) if embedded_BSE is None else embedded_BSE
        mask = Mask(True, documents_BS, prefix=prefix_B)
        return Hidden(*self.run(x_BSE, positions_S, mask, noise))
