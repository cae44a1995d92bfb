"""T5: an encoder-decoder (Raffel et al. 2020); with absolute positions, the Transformer (Vaswani et al. 2017).

Shapes: B batch, S encoder's sequence, T decoder's sequence, E hidden size.
"""

from __future__ import annotations

from torch import Tensor, nn

from headway.kernels.attention.masks import Mask
from headway.pretrain import config
from headway.pretrain.models.columns import Columns
from headway.pretrain.models.embeddings import TokenEmbedding
from headway.pretrain.models.hidden import Hidden
from headway.pretrain.models.inputs import Inputs
from headway.pretrain.models.layers import Noise
from headway.pretrain.models.taps import Taught
from headway.pretrain.models.transformer import Tower


class T5(nn.Module):
    """One table of tokens, an encoder that sees all, a causal decoder that sees the encoder's output."""

    def __init__(self, model: config.Model, inputs: Inputs) -> None:
        super().__init__()
        self.embed = TokenEmbedding(model, inputs)
        self.encoder = Tower(model, causal=False, tokens=inputs.length)
        self.decoder = Tower(
            model, layers=model.decoder_depth, causal=True, cross=True, tokens=inputs.target_length
        )

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BT: Tensor,
        documents_BS: Tensor | None = None,
        target_documents_BT: Tensor | None = None,
        noise: Noise | None = None,
        columns: Columns | None = None,
        target_columns: Columns | None = None,
    ) -> Hidden:
        """
        Args:
            tokens_BS: int64, what the encoder reads.
            targets_BT: int64, what the decoder reads: the targets, shifted right.
            documents_BS: int, of the encoder's whole row (padding is document -1). None: all see all.
            target_documents_BT: int, of the decoder's whole row, which see those of the same document here and there.
            noise: what dropout depends on; None drops nothing.
            columns, target_columns: which columns of the rows the tokens and targets are; all if None.
        """
        memory_BSE, sides = self.encode(tokens_BS, documents_BS, noise, None, columns)
        asked = target_documents_BT, noise, None, columns, target_columns
        final, more = self.decode(memory_BSE, targets_BT, documents_BS, *asked)
        return Hidden(final, sides + more)

    def decode(
        self,
        memory_BSE: Tensor,
        targets_BT: Tensor,
        documents_BS: Tensor | None = None,
        target_documents_BT: Tensor | None = None,
        noise: Noise | None = None,
        embedded_BTE: Tensor | None = None,
        columns: Columns | None = None,
        target_columns: Columns | None = None,
        taught: Taught | None = None,
    ) -> tuple[Tensor, list]:
        """The decoder's output [B, T, E], and what its blocks give beside; `embedded_BTE` goes into the first block,
        where something else has embedded the targets; `taught` is for taps."""
        columns, asking = Columns.of(columns, memory_BSE), Columns.of(target_columns, targets_BT)
        x_BTE = self.embed(targets_BT, asking.places_S, noise) if embedded_BTE is None else embedded_BTE
        split = asking.total and columns.total and (asking.total, columns.total)
        documents_BT = _zeros(target_documents_BT, len(targets_BT), len(asking.all_S), documents_BS)
        across = Mask(False, documents_BT, key_documents=documents_BS, split=split or None)
        mask = Mask(True, target_documents_BT)
        return self.decoder.run(x_BTE, asking, mask, noise, memory_BSE, across, taught=taught)

    def encode(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        noise: Noise | None = None,
        embedded_BSE: Tensor | None = None,
        columns: Columns | None = None,
        taught: Taught | None = None,
    ) -> tuple[Tensor, list]:
        """The encoder's output [B, S, E], and what its blocks give beside; `embedded_BSE` goes into the first block,
        where something else has embedded the tokens; `taught` is for taps."""
        columns = Columns.of(columns, tokens_BS)
        x_BSE = self.embed(tokens_BS, columns.places_S, noise) if embedded_BSE is None else embedded_BSE
        return self.encoder.run(x_BSE, columns, Mask(False, documents_BS), noise, taught=taught)


def _zeros(documents: Tensor | None, rows: int, length: int, keys: Tensor | None) -> Tensor | None:
    """Documents of the queries of cross-attention: all of document 0 if only the keys' are given."""
    if documents is not None or keys is None:
        return documents if keys is not None else None
    return keys.new_zeros(rows, length)
