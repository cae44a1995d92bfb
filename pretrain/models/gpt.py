"""GPT: a causal decoder, from GPT-2 (Radford et al. 2019) to Llama (Touvron et al. 2023) by configuration.

Shapes: B batch, S sequence, E hidden size.
"""

from __future__ import annotations

from torch import Tensor

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.embeddings import TokenEmbedding
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.taps import Taught
from headway.pretrain.models.transformer import Tower


class GPT(Tower):
    """Embeddings, a stack of blocks, a final norm (pre-norm models only)."""

    embed: TokenEmbedding

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__(model, causal=True, embed=TokenEmbedding(model, inputs), tokens=inputs.length)

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        columns: Columns | None = None,
        noise: Noise | None = None,
        prefix_B: Tensor | None = None,
        embedded_BSE: Tensor | None = None,
        taught: Taught | None = None,
    ) -> Hidden:
        """
        Args:
            tokens_BS: int64.
            documents_BS: int, of the whole row; tokens see their own document only. None: all earlier tokens.
            columns: which columns of the row the tokens are; all if None.
            noise: what dropout depends on; None drops nothing.
            prefix_B: int64; so many first tokens of a row are seen by all of it (prefix LM).
            embedded_BSE: what goes into the first block, where something else has embedded the tokens.
            taught: what a teacher gave, for taps of blocks.
        """
        columns = Columns.of(columns, tokens_BS)
        x_BSE = self.embed(tokens_BS, columns.places_S, noise) if embedded_BSE is None else embedded_BSE
        mask = Mask(True, documents_BS, prefix=prefix_B)
        return Hidden(*self.run(x_BSE, columns, mask, noise, taught=taught))
